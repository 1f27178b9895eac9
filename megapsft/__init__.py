"""megapsft: post-training on Megatron-Core, proved on a laptop, run on a cluster."""

from megapsft.platform.children import end_with_parent
from megapsft.platform.cpu import install

__version__ = "0.1.0"

end_with_parent()
install()  # before anything imports megatron; does nothing where CUDA exists
