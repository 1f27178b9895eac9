"""megapsft: post-training on Megatron-Core, proved on a laptop, run on a cluster."""

from megapsft.platform.cpu import install

__version__ = "0.1.0"

install()  # before anything imports megatron; does nothing where CUDA exists
