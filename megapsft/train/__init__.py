"""Batches to updates: the loop, the update, the optimizer, the source of samples."""
