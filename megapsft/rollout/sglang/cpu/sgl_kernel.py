"""In the place of SGLang's compiled kernels on a machine without CUDA, where the package registry has no build of them.

SGLang imports names from here when it starts, and takes torch's own operators on a CPU; a kernel that is called after all says
so.
"""

import torch

__version__ = "0.0.0+standin"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} needs CUDA; this machine has a stand-in of its names only")

    return absent


class _Cudart:
    """SGLang registers the host memory of --enable-return-routed-experts with CUDA; here there is nothing to register it with."""

    class cudaError:
        success = 0

    def cudaHostRegister(self, *arguments):
        return 0

    def cudaHostUnregister(self, *arguments):
        return 0


if not torch.cuda.is_available():
    torch.cuda.cudart = _Cudart
