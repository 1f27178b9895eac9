"""The model as a distribution over the next token."""
