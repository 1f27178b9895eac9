"""In the place of torchvision, whose build for CUDA the registry has alone, and which cannot be loaded beside torch for CPUs.

SGLang and transformers import names of it for models that see; models of text never call them. Every module below this one is
there, and every name in it; one that is called after all says so.
"""

import enum
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.0.0+standin"
__path__ = []


class InterpolationMode(enum.Enum):
    """The one thing whose values are read on import."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Names(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return InterpolationMode

        class Absent:
            def __init__(self, *arguments, **options):
                raise NotImplementedError(f"{where}: this machine has a stand-in of its names only")

        where = Absent.__qualname__ = f"{self.__name__}.{name}"
        return Absent


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec):
        return _Names(spec.name)

    def exec_module(self, module):
        """There is nothing to execute."""


sys.meta_path.append(_Finder())
from torchvision import io, transforms  # noqa: E402, F401
