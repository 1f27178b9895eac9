"""From prompts to rollouts. No torch model here: an engine samples, or has sampled."""
