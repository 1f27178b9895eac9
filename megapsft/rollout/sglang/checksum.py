"""What a server's checksums must be, from the stream: the same bytes in the layout that the server keeps them in.

SGLang's /weights_checker gives one hash for each parameter of each tensor-parallel rank: q, k, v are one parameter there, gate
and up another, the experts of a layer two, and rows of the vocabulary are padded to 64.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapsft.errors import Refused

VOCABULARY_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE of SGLang
FP8_BLOCK = 128
FUSED = re.compile(r"(.*)\.(?:(q|k|v)_proj|(gate|up)_proj)\.(weight|bias)$")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
MASK = 0xFFFFFFFF

Checksums = list[dict[str, str]]  # of each tensor-parallel rank: parameter -> 16 hexadecimal digits


class Expected:
    """The checksums of a stream, as it goes by: the weights of at most a layer are held on to."""

    def __init__(self, model: Path, dtype: torch.dtype, tp_size: int, device: str):
        """
        Args:
            model: the folder whose config.json says what the heads and experts are.
            dtype: of the server's weights.
            device: of the server: it hashes on it, another way on CUDA than on a CPU.
        """
        config = json.loads((model / "config.json").read_text())
        self._kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        self._experts = config.get("num_experts") or config.get("num_local_experts") or 0
        self._dtype, self._tp, self._cuda = dtype, tp_size, device == "cuda"
        self._found: Checksums = [{} for _ in range(tp_size)]
        self._parts: dict[str, dict[int, tuple[Tensor, ...]]] = {}  # fused parameter -> place in it -> slices of the ranks
        self._fp8: dict[str, Tensor] = {}  # quantized weights whose scales are still to come

    def add(self, name: str, tensor: Tensor) -> None:
        """The tensor's memory must stay as it is until the layer is complete."""
        if tensor.dtype == torch.float8_e4m3fn:
            self._fp8[name] = tensor
            return
        if name.endswith(".weight_scale_inv"):
            name = name.removesuffix("_scale_inv")
            tensor = dequantized(self._fp8.pop(name), tensor)
        else:
            tensor = tensor.to(self._dtype)
        fused, place, places, slices = self._placed(name, tensor)
        parts = self._parts.setdefault(fused, {})
        parts[place] = slices
        if len(parts) == places:
            del self._parts[fused]
            for rank, found in enumerate(self._found):
                found[fused] = hashed([parts[place][rank] for place in range(places)], self._cuda)

    def end(self) -> Checksums:
        """Raises Refused where the stream lacked parts of a fused parameter."""
        missing = sorted([*self._parts, *self._fp8])
        if missing:
            rule = f"has only parts of {', '.join(missing[:3])}"
            raise Refused("the stream of weights", rule, "export every weight of the checkpoint")
        return self._found

    def _placed(self, name: str, tensor: Tensor) -> tuple[str, int, int, tuple[Tensor, ...]]:
        """Name of the server's parameter, the place of this one in it, how many places it has, and the slice of each rank."""
        expert = EXPERT.match(name)
        if expert:
            layer, number, which = expert[1], int(expert[2]), expert[3]
            if which == "down":
                return f"{layer}.w2_weight", number, self._experts, tensor.chunk(self._tp, 1)
            return f"{layer}.w13_weight", 2 * number + (which == "up"), 2 * self._experts, tensor.chunk(self._tp, 0)
        fused = FUSED.match(name)
        if fused and fused[2]:
            return f"{fused[1]}.qkv_proj.{fused[4]}", "qkv".index(fused[2]), 3, self._heads(fused[2], tensor)
        if fused:
            return f"{fused[1]}.gate_up_proj.{fused[4]}", int(fused[3] == "up"), 2, tensor.chunk(self._tp, 0)
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            return name, 0, 1, tensor.chunk(self._tp, 1)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padding = -tensor.shape[0] % VOCABULARY_MULTIPLE
            return name, 0, 1, torch.nn.functional.pad(tensor, (0, 0, 0, padding)).chunk(self._tp, 0)
        return name, 0, 1, (tensor,) * self._tp

    def _heads(self, which: str, tensor: Tensor) -> tuple[Tensor, ...]:
        if which == "q" or self._kv_heads >= self._tp:
            return tensor.chunk(self._tp, 0)
        heads = tensor.chunk(self._kv_heads, 0)  # more ranks than heads of keys and values: each is on several
        return tuple(heads[rank * self._kv_heads // self._tp] for rank in range(self._tp))


def reported(answer: Mapping[str, Any]) -> Checksums:
    """Those of /weights_checker, in the order of the ranks."""
    ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
    return [dict(rank["checksums"]) for rank in ranks]


def difference(expected: Checksums, found: Checksums) -> str | None:
    """The first parameters that differ, or None."""
    if len(expected) != len(found):
        return f"{len(found)} ranks instead of {len(expected)}"
    names = {name for a, b in zip(expected, found, strict=True) for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    if not names:
        return None
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def summary(checksums: Checksums) -> str:
    """One checksum of all, for logs."""
    lines = (f"{rank} {name} {value}\n" for rank, found in enumerate(checksums) for name, value in sorted(found.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hashed(parts: list[Tensor], cuda: bool) -> str:
    """The server's hash of one tensor that consists of these, one after the other."""
    if cuda:
        return f"{hash_of_cuda(torch.cat([words(part) for part in parts])):016x}"
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def words(part: Tensor) -> Tensor:
    """Its bytes, on the GPU where there is one."""
    part = part.detach().contiguous().reshape(-1).view(torch.uint8)
    return part.cuda() if torch.cuda.is_available() else part


def hash_of_cuda(data: Tensor, tile: int = 8192, tiles_at_once: int = 1024) -> int:
    """SGLang's hash of a tensor on a GPU (gpu_tensor_hash), in torch's integers: sums of mixed 32-bit words by tiles."""
    padded = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    total, count = 0, padded.numel()
    seed = 0x243F6A88
    seeds = (seed & MASK, ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & MASK)
    length = (count * 4) & MASK
    for start in range(0, count, tile * tiles_at_once):
        value = padded[start : start + tile * tiles_at_once].to(torch.int64) & MASK
        index = torch.arange(start, start + value.numel(), device=data.device, dtype=torch.int64) & MASK
        halves = []
        for factor, by, offset in ((0x27D4EB2D, 15, seeds[0]), (0x165667B1, 13, seeds[1])):
            place = ((_times(index, factor) + offset) & MASK) ^ ((index << by | index >> (32 - by)) & MASK)
            mixed = torch.nn.functional.pad(_mix(value ^ place), (0, -value.numel() % tile))
            halves.append(_mix((mixed.view(-1, tile).sum(1) & MASK) ^ length))
        total += sum((high << 32) + low for high, low in zip(halves[0].tolist(), halves[1].tolist(), strict=True))
    return _splitmix64(total) if count else 0


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor mod 2^32 of 32-bit x: in two halves, which do not overflow 63 bits."""
    return ((x * (factor & 0xFFFF)) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & MASK


def _mix(x: Tensor) -> Tensor:
    x = _times(x ^ x >> 16, 0x85EBCA6B)
    x = _times(x ^ x >> 13, 0xC2B2AE35)
    return x ^ x >> 16


def _splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x &= mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 of blocks of 128 x 128 in fp8, as the server hashes them."""
    rows = scale.float().repeat_interleave(FP8_BLOCK, 0)[: weight.shape[0]]
    return (weight.float() * rows.repeat_interleave(FP8_BLOCK, 1)[:, : weight.shape[1]]).to(torch.bfloat16)
