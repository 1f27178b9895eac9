"""Which backend computes the head, and why: Triton's kernels where they are there and run, else torch, and the user is told."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from megapsft.errors import Refused
from megapsft.policy.head import statistics as plain
from megapsft.policy.head.statistics import Wanted

Backend = Literal["torch", "triton", "reference"]
AS_SAID = "as model.logprob_backend says"


def choose_backend(name: str) -> tuple[Backend, str]:
    """What `model.logprob_backend` comes to on this machine, and why; nothing is run on the device.

    Raises:
        Refused: triton where it cannot run.
    """
    return (name, AS_SAID) if name in ("torch", "reference") else settled(name, [missing(name)])


@functools.cache  # once a process: the machine stays as it is
def working_backend(name: str) -> tuple[Backend, str]:
    """Collective. As `choose_backend`, once Triton's kernels have run on the device of every rank; the same on all of them.

    Raises:
        Refused: triton where it does not run.
    """
    if name in ("torch", "reference"):
        return name, AS_SAID
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, missing(name) or failure())
    return settled(name, reasons)


def settled(name: str, reasons: Sequence[str | None]) -> tuple[Backend, str]:
    """Triton, unless some rank has a reason why it cannot be."""
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        return "triton", "CUDA and Triton are here"
    if name == "triton":
        raise Refused("model.logprob_backend=triton", f"needs Triton's kernels to run: {reason}", "use auto or torch")
    return "torch", reason


def missing(name: str) -> str | None:
    """What there is not that Triton's kernels need; None where nothing is missing. In Triton's interpreter they need no CUDA."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    if torch.cuda.is_available() or (name == "triton" and _kernels().INTERPRETED):
        return None
    return "there is no CUDA device here"


def failure() -> str | None:
    """Why both kernels do not give on this device what head/statistics.py gives; None where they do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z = torch.linspace(-2, 3, 3 * 2051).view(3, 2051)  # of columns a block and a part
    labels = torch.tensor([0, 2050, 7])
    ones = torch.ones(3)
    try:
        found, kernels = z.to(device, torch.bfloat16), _kernels()
        stats = kernels.statistics(found, None, labels.to(device), None, None).cpu()
        expected = plain.statistics(found.float().cpu(), None, labels, None, None)
        known, *_ = plain.finish(expected, None)
        on_device = plain.finish(expected.to(device), None)[0]
        gradient = plain.gradient(found.float().cpu(), None, labels, known, Wanted(ones, ones, None), None)
        kernels.gradient(found, None, labels.to(device), on_device, Wanted(ones.to(device), ones.to(device), None), None)
        torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.float().cpu(), gradient, rtol=1e-2, atol=1e-3)
    except Exception as error:  # of a compiler, a driver, a comparison: whatever it is, the other backend does without them
        return f"Triton's kernels do not run ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


def kernels() -> Any:
    """The module of Triton's kernels, imported where it is asked for only.

    Raises:
        Refused: it cannot run here.
    """
    choose_backend("triton")
    return _kernels()


def _kernels() -> Any:
    from megapsft.policy.head import triton_kernels

    return triton_kernels


__all__ = ["Backend", "choose_backend", "failure", "kernels", "settled", "working_backend"]
