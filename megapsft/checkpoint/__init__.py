"""States of a run: torch_dist checkpoints to continue from, Hugging Face weights in and out."""
