"""Fine-tuning by recipe: stages of losses, from a laptop to many GPUs (`docs/training.md`).

run, loop                         a run from start to end; one stage of it
plan, run_status                  what a run will do; its options, status and result
objective, losses, trainable      what is minimised; what is trained, and how
teacher_cache, batches            teacher outputs on disk; training images
validation                        which weights are better
log, run_folder, saved_state      what a run writes
devices, interrupts               precision and processes; Ctrl-C
"""
