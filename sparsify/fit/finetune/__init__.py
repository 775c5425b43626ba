"""Fine-tuning by recipe: stages of losses, from a laptop to many GPUs (`docs/training.md`).

run, loop                         a run from start to end; one stage of it, between whose steps Ctrl-C is honoured
plan                              what a run will do, and its options
objective, losses, trainable      what teacher and student give; what is minimised; what is trained, and how
batches, validation               training images; which weights are better
log, run_folder, saved_state      what a run writes, and where it stands
"""
