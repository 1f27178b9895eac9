"""What differs between a machine with CUDA and one without, and between Megatron-Core versions; nothing else."""
