"""The same loss and gradient for every split as on one rank: real processes, real Megatron, real packing."""
