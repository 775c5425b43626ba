"""Fine-tuning by recipe: stages of losses, from a laptop to many GPUs (`docs/training.md`)."""
