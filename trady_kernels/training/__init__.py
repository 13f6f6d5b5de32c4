"""The fine-tuning loop, its checkpoints, and what a run leaves behind."""
