"""Block-quantised FP8 as Hugging Face checkpoints store it: `X.weight` in float8_e4m3fn, `X.weight_scale_inv` for its blocks.

    value = X.weight * scale of its block of 128 x 128, or what config.json's weight_block_size says; scales are fp32

What survives FP8 -> bf16 or fp32 -> FP8, that is `Quantised` of `Dequantised`:

    the FP8 values, bit by bit, of every block whose largest one is +-448, as those that this quantiser and its like make are:
        a rounding to bf16 moves a number by 2^-8 of itself at most, and the scale as much; 2^-5 would reach another FP8 value
    the scales of such blocks not bit by bit: they move by 2^-8 at most through bf16, by one unit in the last place through fp32
    neither, where the largest value of a block is another one (scales that are powers of two, or were chosen otherwise): the
        block gets a scale of its own then, and its numbers are off by 1/28 of the largest of them at most
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapsft.checkpoint.weights import Shape, Stored, Weights, rows_of
from megapsft.checkpoint.weights.hf import some
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import QKV, GatedMLP, RowParallel

WINDOWS = 1  # that a read holds beside its output; besides, a few rows of blocks in fp32
FP8, LARGEST = torch.float8_e4m3fn, 448.0
SCALE = "_scale_inv"  # after the name of a weight: the name of its scales
BLOCK = (128, 128)
CHUNK_BYTES = 4 * 2**20  # of unquantised rows at once
SCALE_DTYPES = (torch.float32, torch.bfloat16)


class Dequantised:
    """Weights without FP8: each value times its scale, in fp32, rounded once to `dtype`. Other tensors pass as they are.

    Args:
        block: rows and columns that share a scale; HFConfig.fp8_block.

    Raises:
        Refused: FP8 tensors without scales, scales without an FP8 tensor, scales of another shape or dtype than fp32 or bf16.
            When rows are read: scales that are infinite or not a number. FP8 values that are not a number stay it.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = BLOCK):
        self._weights, self._block = weights, block
        _check_scales(weights.tensors, block)
        self.tensors: dict[str, Stored] = {}
        for name, stored in weights.tensors.items():
            if not name.endswith(SCALE):
                self.tensors[name] = Stored(stored.shape, dtype) if stored.dtype == FP8 else stored

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] of the dtype that `tensors` says."""
        stored = self._weights.tensors[name]
        if stored.dtype != FP8:
            self._weights.read(name, start, stop, out)
            return
        values = torch.empty(out.shape, dtype=FP8)
        self._weights.read(name, start, stop, values)
        scales, columns = self._scales(name + SCALE), stored.shape[1]
        for part in _parts(start, stop, self._block[0]):
            rows = slice(part.low - start, part.high - start)
            out[rows].copy_(_product(values[rows], _spread(scales[part.block], self._block[1], columns)))

    def _scales(self, name: str) -> Tensor:
        """All scales of a tensor, fp32."""
        stored = self._weights.tensors[name]
        found = torch.empty(stored.shape, dtype=stored.dtype)
        self._weights.read(name, 0, stored.rows, found)
        wrong = int((~found.isfinite()).sum())
        if wrong:
            raise Refused(name, f"has {wrong} scales that are infinite or not a number", "download or copy the checkpoint again")
        return found.float()


class Quantised:
    """Weights with some of them in FP8, their scales after them: the inverse of `Dequantised`.

    scale = amax of the block / 448 in fp32, 1 where amax is 0; value = weight / scale in fp32, to the nearest e4m3, ties to even.
    Scales are of whole blocks: what is read does not depend on which rows are asked for together.

    Args:
        names: of the tensors that are quantised; `linear_weights` of a model.
        block: rows and columns that share a scale.

    Raises:
        Refused: names that are not there, not of two dimensions or not of a floating dtype. When rows are read: weights that
            are infinite or not a number, which would spoil their whole block.
    """

    def __init__(self, weights: Weights, names: Collection[str], block: tuple[int, int] = BLOCK):
        self._weights, self._block, self._names = weights, block, frozenset(names)
        self._known: dict[str, Tensor] = {}  # scales that were found while values were read, NaN where they were not
        absent = sorted(self._names - set(weights.tensors))
        if absent:
            raise Refused(some(absent), "are to be quantised, but are not there", "name tensors of the checkpoint")
        self.tensors: dict[str, Stored] = {}
        for name, stored in weights.tensors.items():
            if name not in self._names:
                self.tensors[name] = stored
                continue
            if len(stored.shape) != 2 or not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
                rule = f"is {list(stored.shape)} of {stored.dtype}, which cannot be quantised in blocks"
                raise Refused(name, rule, "quantise matrices in bfloat16, float16 or float32")
            self.tensors[name] = Stored(stored.shape, FP8)
            self.tensors[name + SCALE] = Stored(_blocks_of(stored.shape, block), torch.float32)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] of the dtype that `tensors` says."""
        if name in self._names:
            self._read_values(name, start, stop, out)
        elif name.removesuffix(SCALE) in self._names:
            self._read_scales(name.removesuffix(SCALE), start, stop, out)
        else:
            self._weights.read(name, start, stop, out)

    def _read_values(self, name: str, start: int, stop: int, out: Tensor) -> None:
        rows, columns = self._block[0], self._weights.tensors[name].shape[1]
        first, last = start // rows, -(-stop // rows)
        known = self._known.setdefault(name, self._unknown(name))
        for block, weights in self._blocks(name, first, last):
            scales = known[block] = self._scales_of(name, block, weights)
            low, high = max(start, block * rows), min(stop, block * rows + len(weights))
            scaled = weights[low - block * rows : high - block * rows].div_(_spread(scales, self._block[1], columns))
            scaled.clamp_(-LARGEST, LARGEST)  # some versions of torch make NaN of what is larger
            out[low - start : high - start].copy_(scaled)

    def _read_scales(self, name: str, start: int, stop: int, out: Tensor) -> None:
        known = self._known.get(name, self._unknown(name))
        out.copy_(known[start:stop])
        for missing in out.isnan().any(dim=1).nonzero().flatten().tolist():
            for block, weights in self._blocks(name, start + missing, start + missing + 1):
                out[missing] = self._scales_of(name, block, weights)
        if stop == self.tensors[name + SCALE].rows:
            self._known.pop(name, None)

    def _unknown(self, name: str) -> Tensor:
        return torch.full(self.tensors[name + SCALE].shape, torch.nan)

    def _blocks(self, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """(number, [rows of a block, columns] fp32) of the rows of blocks from `first` to `last`, read several at a time."""
        stored, rows = self._weights.tensors[name], self._block[0]
        step = max(1, CHUNK_BYTES // (rows * stored.row_bytes))
        for start in range(first, last, step):
            begin, end = start * rows, min(min(start + step, last) * rows, stored.rows)
            weights = torch.empty((end - begin, *stored.row_shape), dtype=stored.dtype)
            self._weights.read(name, begin, end, weights)
            for block, part in enumerate(weights.split(rows), start):
                yield block, part.float()

    def _scales_of(self, name: str, block: int, weights: Tensor) -> Tensor:
        """[blocks beside each other] fp32 of one row of blocks."""
        amax = weights.abs().amax(dim=0)  # five times as fast as aminmax
        if not amax.isfinite().all():
            rows = f"rows {block * self._block[0]} to {block * self._block[0] + len(weights)}"
            rule = f"has numbers in {rows} that are infinite or not a number"
            raise Refused(name, rule, "export without FP8 to look at them, or export an earlier checkpoint")
        scales = torch.stack([part.amax() for part in amax.split(self._block[1])]) / LARGEST
        return torch.where(scales > 0, scales, 1)  # also where it is too small for fp32


def quantised_stream(
    stream: Iterable[tuple[str, Tensor | None]], names: Collection[str], block: tuple[int, int] = BLOCK
) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of an exporter with some of them in FP8, each followed by its scales: the bytes of `Quantised`.

    Memory: a tensor, and its FP8. Without a tensor (None) its names come alone.

    Args:
        names: as of `Quantised`.

    Raises:
        Refused: what `Quantised` refuses of a tensor.
    """
    chosen = frozenset(names)
    for name, tensor in stream:
        if name not in chosen:
            yield name, tensor
        elif tensor is None:
            yield name, None
            yield name + SCALE, None
        else:
            quantised = Quantised(_One(name, tensor), [name], block)
            for part in quantised.tensors:
                yield part, rows_of(quantised, part)


class _One:
    """Weights of one tensor, in memory."""

    def __init__(self, name: str, tensor: Tensor):
        self._tensor, self.tensors = tensor, {name: Stored(tuple(tensor.shape), tensor.dtype)}

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._tensor[start:stop])


def linear_weights(hf: HFConfig) -> list[str]:
    """The tensors that FP8 checkpoints quantise: projections of attention and MLPs, not embeddings, norms, routers, biases."""
    rules = family_of(hf).parameters(hf)
    return [name for rule in rules if isinstance(rule, QKV | GatedMLP | RowParallel)
            for name, shape in rule.sources.items() if len(shape) == 2]  # fmt: skip


def quantization_config(hf: HFConfig, block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    """What config.json says of a model whose `linear_weights` are quantised, as in the FP8 repositories of Qwen3."""
    kept = ["input_layernorm", *(["mlp.gate"] if hf.num_experts else []), "post_attention_layernorm"]
    modules = [f"model.layers.{layer}.{name}" for layer in range(hf.num_hidden_layers) for name in kept]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *modules],
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


class _Part(NamedTuple):
    """Rows that lie in one row of blocks."""

    block: int
    low: int
    high: int


def _parts(start: int, stop: int, rows: int) -> Iterator[_Part]:
    for block in range(start // rows, -(-stop // rows)):
        yield _Part(block, max(start, block * rows), min(stop, (block + 1) * rows))


def _blocks_of(shape: Shape, block: tuple[int, int]) -> Shape:
    """How many blocks there are below and beside each other."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _spread(scales: Tensor, width: int, columns: int) -> Tensor:
    """[columns]: the scale of each column, from those of the blocks beside each other."""
    return scales.repeat_interleave(width)[:columns]


def _product(values: Tensor, scales: Tensor) -> Tensor:
    """values [rows, columns] FP8 times scales [columns] fp32, in fp32."""
    codes = values.view(torch.int8)
    if codes.max() == 0x7F or values.view(torch.uint8).max() == 0xFF:  # not numbers
        return values.float().mul_(scales)
    # the bits of a value, moved to their places in float16, are the value / 256; torch's own conversion takes five times as long
    half = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return half.float().mul_(256).mul_(scales)


def _check_scales(tensors: Mapping[str, Stored], block: tuple[int, int]) -> None:
    fp8 = {name: stored for name, stored in tensors.items() if stored.dtype == FP8}
    lacking = [name for name in fp8 if name + SCALE not in tensors]
    if lacking:
        rule = f"{len(lacking)} FP8 tensors have no {SCALE} beside them: {some(lacking)}"
        raise Refused("checkpoint", rule, "download it again, or use it in bfloat16")
    lonely = [name for name in tensors if name.endswith(SCALE) and name.removesuffix(SCALE) not in fp8]
    if lonely:
        rule = f"{len(lonely)} tensors are scales of something that is not there in FP8: {some(lonely)}"
        raise Refused("checkpoint", rule, "download it again, or use it in bfloat16")
    for name, stored in fp8.items():
        if len(stored.shape) != 2:
            raise Refused(name, f"is FP8 of shape {list(stored.shape)}, not a matrix", "use the checkpoint in bfloat16")
        scales, wanted = tensors[name + SCALE], _blocks_of(stored.shape, block)
        if scales.shape != wanted:
            rule = f"has shape {list(scales.shape)}, but {list(stored.shape)} in blocks of {list(block)} makes it {list(wanted)}"
            raise Refused(name + SCALE, rule, "mend weight_block_size in config.json, or use the checkpoint in bfloat16")
        if scales.dtype not in SCALE_DTYPES:
            rule = f"is stored as {scales.dtype}, not as float32 or bfloat16"
            raise Refused(name + SCALE, rule, "use the checkpoint in bfloat16")
