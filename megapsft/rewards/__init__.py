"""What a rollout is worth. Pure Python, no torch."""
