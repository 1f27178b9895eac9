"""NVIDIA's apex is an accelerator that Megatron takes where it finds it, and never needs.

The package index has another program under its name. Megatron imports whatever is called so: where that fails in another way
than by not being there, Megatron does not start, and where it succeeds it counts on kernels that are not there.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path


def other_apex() -> str | None:
    """Where an `apex` lies that is not NVIDIA's, or is NVIDIA's without its kernels; else None."""
    spec = PathFinder.find_spec("apex")
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    nvidia = any((Path(place) / "multi_tensor_apply").is_dir() for place in places)
    if nvidia and PathFinder.find_spec("amp_C") is not None:
        return None
    return places[0] if places else spec.origin


def hide_other_apex() -> None:
    """Make `import apex` say that there is none, unless it is NVIDIA's with its kernels or was imported before."""
    if "apex" not in sys.modules and other_apex() is not None:
        sys.modules["apex"] = None  # Python's own mark of a module that is not to be found


def note_on_apex() -> str | None:
    """What the user should know of such an `apex`."""
    place = other_apex()
    if place is None:
        return None
    return f"The package apex in {place} is not NVIDIA's, or lacks its kernels: it is not used (pip uninstall apex)."
