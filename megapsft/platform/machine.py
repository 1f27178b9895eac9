"""What this machine can compute with: its GPU, its CUDA, and Transformer Engine, or why there is none."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megapsft.config import ModelConfig
from megapsft.errors import Refused
from megapsft.platform.cpu import has_cuda

Version = tuple[int, int]
Layers = Literal["local", "transformer_engine"]
OLDEST = (2, 3)  # Transformer Engine that has every recipe of FP8


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Versions are (major, minor)."""

    capability: Version | None = None  # compute capability of the first GPU; None without one
    cuda: Version | None = None  # that torch was built with
    transformer_engine: Version | None = None
    problem: str | None = None  # why Transformer Engine is there, but cannot be imported

    def without_transformer_engine(self) -> str | None:
        """Why layers cannot be Transformer Engine's, or None."""
        if self.capability is None:
            return "needs a CUDA GPU, and torch sees none"
        if self.problem is not None:
            return f"cannot be imported: {self.problem}"
        if self.transformer_engine is None:
            return "is not installed"
        if self.transformer_engine < OLDEST:
            return f"is {_text(self.transformer_engine)}, and {_text(OLDEST)} or newer is needed"
        return None


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Looked at once. Transformer Engine is imported where there is CUDA, as only that shows whether it can be."""
    import torch

    if not has_cuda():
        return Machine()
    found: dict[str, Version | str] = {}
    if importlib.util.find_spec("transformer_engine") is not None:
        try:
            import transformer_engine.pytorch

            found["transformer_engine"] = version_of(transformer_engine.__version__)
        except Exception as error:  # missing or mismatched libraries fail in any way
            found["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Machine(capability=torch.cuda.get_device_capability(), cuda=version_of(torch.version.cuda or "0.0"), **found)


def version_of(text: str) -> Version:
    """The first two numbers of a version.

    Example:
        >>> version_of("2.19.0.dev0+abc")
        (2, 19)
    """
    major, minor = re.match(r"(\d+)(?:\.(\d+))?", text).groups(default="0")
    return int(major), int(minor)


def layers_of(model: ModelConfig, machine: Machine) -> Layers:
    """Whose layers `model.transformer_impl` comes to on the machine.

    Raises:
        Refused: Transformer Engine's are asked for, and cannot be.
    """
    if model.transformer_impl == "local":
        return "local"
    reason = machine.without_transformer_engine()
    remedy = "install Transformer Engine (docs/gpu.md), or use model.transformer_impl=auto"
    if machine.capability is None:
        remedy = "train where there is one (docs/gpu.md), or use model.transformer_impl=auto"
    if reason is None and model.dtype == "float32":
        reason, remedy = "has no attention to packed rows in float32", "use model.dtype=bfloat16, or model.transformer_impl=local"
    if reason is None:
        return "transformer_engine"
    if model.transformer_impl == "auto":
        return "local"
    raise Refused("model.transformer_impl=transformer_engine", f"Transformer Engine {reason}", remedy)


def note_on_layers(model: ModelConfig, machine: Machine) -> str | None:
    """Why a machine with a GPU does not use Transformer Engine's layers, where nobody asked for others."""
    reason = machine.without_transformer_engine()
    if model.transformer_impl != "auto" or machine.capability is None or reason is None:
        return None
    return f"Layers are Megatron's local ones, which are slower: Transformer Engine {reason} (docs/gpu.md)."


def _text(version: Version) -> str:
    return ".".join(map(str, version))


__all__ = ["Layers", "Machine", "layers_of", "note_on_layers", "this_machine", "version_of"]
