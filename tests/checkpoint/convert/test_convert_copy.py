"""What is found in bytes on their way: the hash of all, and how many numbers are infinite or not a number, exactly."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch

from megapsft.checkpoint.convert import copy
from megapsft.checkpoint.convert.copy import NOT_FINITE, inspect
from megapsft.checkpoint.files.direct import as_bytes, new_buffer
from megapsft.checkpoint.files.safetensors import DTYPES


def inspected(tensor: torch.Tensor) -> tuple[int, str]:
    digest = hashlib.sha256()
    content = new_buffer(tensor.nbytes)
    content.copy_(as_bytes(tensor))
    return inspect(content, tensor.dtype, digest), digest.hexdigest()


def not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor.double())).sum())


def test_every_dtype_that_is_read_is_looked_through():
    assert NOT_FINITE.keys() == set(DTYPES.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_number_that_there_is(dtype):
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    tensor = bits.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype)
    found = inspected(tensor)
    assert found == (not_finite(tensor), hashlib.sha256(as_bytes(tensor).numpy()).hexdigest())
    assert found[0] == {torch.bfloat16: 256, torch.float16: 2048, torch.float8_e4m3fn: 2}[dtype]
    finite = tensor.double().isfinite()
    edges = (finite != finite.roll(1)) | (finite != finite.roll(-1))
    edges[::97] = True
    for position in edges.nonzero().flatten().tolist():  # each alone: at first, only the largest is looked at
        one = tensor[position : position + 1]
        assert inspected(one)[0] == not_finite(one), one.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")], ids=str)
def test_one_among_many(dtype, value):
    tensor = torch.randn(1000, dtype=dtype)
    tensor[:4] = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0], dtype=dtype)
    assert inspected(tensor)[0] == 0
    for position in (0, 500, 999):
        spoilt = tensor.clone()
        spoilt[position] = value
        assert inspected(spoilt)[0] == 1


@pytest.mark.parametrize("dtype", list(NOT_FINITE), ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_any_bits_over_several_blocks(dtype, seed, monkeypatch):
    monkeypatch.setattr(copy, "BLOCK", 64)
    random.seed(seed)
    count = random.randrange(1, 200)
    tensor = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    assert inspected(tensor) == (not_finite(tensor), hashlib.sha256(as_bytes(tensor).numpy()).hexdigest())


def test_nothing_has_nothing_in_it():
    assert inspected(torch.empty(0))[0] == 0
