"""Pickles of the torch_dist format, read with a list of the classes that belong there: another is refused before it is called."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata

from megapsft.errors import Refused

REMEDY = "read it with the program that wrote it, and only if you trust where it comes from"
ALLOWED = {  # module -> names that may be called while unpickling
    "torch.distributed.checkpoint.metadata": {name for name in vars(metadata) if isinstance(vars(metadata)[name], type)},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},  # where torch's own writer wrote to
}
OF_STORAGE = (  # numbers of a tensor in a pickle; Megatron-Core puts its own in the place of torch's from 0.18 on
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
)
ALLOWED_IN_STATES = {  # in what Transformer Engine pickles of its own: the recipe of FP8, of 2.18 and newer the delayed one alone
    "transformer_engine.common.recipe": {
        "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams", "MXFP8BlockScaling", "QParams",
        "_FormatHelper", "_OverrideLinearPrecision",
    },
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Of a file, which messages call `what`; calls nothing that `allowed` does not name.

    Raises:
        Refused: another class is named.
    """

    allowed: Mapping[str, set[str]] = ALLOWED

    def __init__(self, file: Any, what: str):
        super().__init__(file)
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()):
            raise Refused(self._what, f"would call {module}.{name} when it is read, which no checkpoint needs", REMEDY)
        return super().find_class(module, name)


def check_values(content: bytes, what: str, states: bool) -> None:
    """That nothing in what torch.save wrote runs code when it is unpickled.

    Args:
        what: what messages call it.
        states: it is an `_extra_state`, in which layers of Transformer Engine have bytes that they pickled themselves.

    Raises:
        Refused: it is damaged, or not made of plain values and tensors.
    """
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what Transformer Engine's states are in
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if states:
            _check_state(found)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(what, f"is not made of plain values and tensors ({reason})", REMEDY) from None
    except Exception as error:  # an unpickler fails in any way on damaged bytes
        raise damaged(what, error) from None


def _check_state(state: Any) -> None:
    """Unpickle what a layer of Transformer Engine pickled into bytes, without importing or calling anything that it names."""
    if isinstance(state, io.BytesIO):
        _States(state).load()
    elif isinstance(state, torch.Tensor) and state.numel():
        _States(io.BytesIO(state.numpy().tobytes())).load()


class _States(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in OF_STORAGE:
            return lambda content: torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if name in ALLOWED_IN_STATES.get(module, ()):
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Inert:
    """Stands for anything that is allowed; does nothing."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def damaged(what: object, error: Exception) -> Refused:
    """What to say where reading `what` failed with `error`."""
    reason = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return Refused(str(what), reason, "copy the checkpoint again, or use another one")


def write_pickle(path: Path, value: object) -> None:
    """As torch's own writer writes `.metadata`, of which the format is a pickle."""
    with path.open("wb") as file:
        pickle.dump(value, file)


__all__ = ["REMEDY", "Unpickler", "check_values", "damaged", "write_pickle"]
