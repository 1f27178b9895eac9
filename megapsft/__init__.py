"""megapsft: post-training on Megatron-Core, proved on a laptop, run on a cluster."""

__version__ = "0.1.0"
