"""The stand-in for `torch.cuda` inside Megatron on a machine without CUDA: one device, one always-synchronous stream.

Everything not named here is torch's own `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from typing import Any

import torch


class Stream:
    """A CPU has one stream and it is always synchronous."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    def __init__(self, *args: Any, **kwargs: Any):
        self.seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end.seconds - self.seconds) * 1e3


class _Generators:
    """`default_generators[any device]` is the one CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _context(*args: Any, **kwargs: Any) -> contextlib.nullcontext:
    return contextlib.nullcontext()


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


_STREAM = Stream()
ExternalStream = Stream
stream = device = StreamContext = _context
set_device = set_stream = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = _lazy_init = _nothing
memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _zero
FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
# the generator itself, not torch.manual_seed: that calls back into torch.cuda
manual_seed = manual_seed_all = torch.default_generator.manual_seed
seed, initial_seed = torch.seed, torch.initial_seed
default_generators = _Generators()
random = sys.modules[__name__]  # torch.cuda.random has the generator's functions again
nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_context, mark=_nothing)


def is_available() -> bool:
    return False


def is_initialized() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def is_bf16_supported(*args: Any, **kwargs: Any) -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> torch.device:
    return torch.device("cpu")


def current_stream(*args: Any) -> Stream:
    return _STREAM


default_stream = current_stream


def get_device_name(*args: Any) -> str:
    return "cpu"


def get_device_capability(*args: Any) -> tuple[int, int]:
    return (0, 0)


def get_device_properties(*args: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(name="cpu", total_memory=2**34, multi_processor_count=1, major=0, minor=0)


def mem_get_info(*args: Any) -> tuple[int, int]:
    return (2**33, 2**34)


def memory_stats(*args: Any) -> dict:
    return {}


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _lazy_call(function: Any, **kwargs: Any) -> None:
    function()


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)
