"""Rewards to advantages, one estimator a file: NumPy in and out, in fp64, and no torch."""
