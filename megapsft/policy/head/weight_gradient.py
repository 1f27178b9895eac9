"""Where the gradient of the output weight goes, slab by slab: back to autograd, or straight into Megatron's fp32 `main_grad`."""

from __future__ import annotations

import torch
from torch import Tensor


class OwnGradient:
    """The weight's gradient as autograd wants it: a tensor of the weight's dtype."""

    def __init__(self, weight: Tensor, columns: int):
        # slabs fill it; padded rows, and shards of nothing else, are not trained
        self.gradient, self.filled = torch.empty_like(weight), False
        self.gradient[columns:] = 0

    def add(self, slab: Tensor, hidden: Tensor, rows: slice, columns: slice, exact: torch.dtype) -> None:
        """The part of a slab's tokens; those of one slab's columns come one after the other."""
        self.filled = True
        if rows.start == 0:
            part = torch.mm(slab.T, hidden[rows], out=self.gradient[columns])
            self.total = part if rows.stop == len(hidden) else part.to(exact)
            return
        accumulate(self.total, slab.T, hidden[rows])
        if rows.stop == len(hidden):
            self.gradient[columns] = self.total

    def finish(self) -> Tensor:
        return self.gradient if self.filled else self.gradient.zero_()  # of no tokens


class MainGradient:
    """The weight's gradient added to the `main_grad` of Megatron's DistributedDataParallel, by the protocol of its fused layers.

    Autograd is given a tensor in its place, so that the hooks of the parameter run; they are told that nothing is left to add
    (`grad_added_to_main_grad`). Of a tied embedding, whose lookup has a gradient too, Megatron adds what autograd has all the
    same (`zero_out_wgrad`): there the tensor is zeros.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight

    def add(self, slab: Tensor, hidden: Tensor, rows: slice, columns: slice, exact: torch.dtype) -> None:
        """The part of a slab's tokens, summed in fp32 over those of its columns, then added."""
        if rows.start == 0:
            self.total = _product(slab.T, hidden[rows], exact)
        else:
            self.total += _product(slab.T, hidden[rows], exact)
        if rows.stop == len(hidden):
            self.weight.main_grad[columns] += self.total

    def finish(self) -> Tensor:
        self.weight.grad_added_to_main_grad = True
        tied = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if tied else torch.empty_like(self.weight)


def gradient_of(weight: Tensor, columns: int) -> OwnGradient | MainGradient:
    """Where the gradient of `weight` goes; only its first `columns` rows have one."""
    adds_itself = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
    return MainGradient(weight) if adds_itself else OwnGradient(weight, columns)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the dtype of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, not rounded to the dtype of the operands where `dtype` is a finer one."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # products of two bf16 numbers are exact in fp32


__all__ = ["accumulate", "gradient_of"]
