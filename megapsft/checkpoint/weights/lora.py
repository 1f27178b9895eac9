"""LoRA adapters in the format of PEFT: read as they are, or merged into the weights that they were trained beside.

    W' = W + s B A,  s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

in fp32, rounded once to the dtype of W. Source: LoRA (Hu et al., ICLR 2022), section 4.1; rsLoRA (Kalajdzievski, 2023), Eq. 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapsft.checkpoint.files.direct import Buffers, Source, as_bytes
from megapsft.checkpoint.files.safetensors import read_header
from megapsft.checkpoint.weights import Shape, Stored, Weights
from megapsft.checkpoint.weights.hf import read_json, some
from megapsft.errors import Refused
from megapsft.models.adapters import PREFIX, A, B
from megapsft.models.names import HF_EMBEDDING, HF_OUTPUT

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
HALVES = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}
BASE = ".base_layer.weight"  # the matrix below an adapter, stored with it where it is an embedding
WINDOWS = 2  # that a read of Merged holds beside its output; besides, A and a few rows in fp32
ROWS = 128  # that are multiplied at once, always the same ones, so that no number depends on which rows are read
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBER = re.compile(r"\.\d+\.")
LOOK_BYTES = 8 * 2**20

USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
}  # fmt: skip
NO_MATTER = {  # when weights are merged
    "lora_dropout", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # that leave the base weights as they are


class Delta(NamedTuple):
    """What an adapter adds to one matrix: the names of its tensors, and how."""

    a: str
    b: str
    shape: Shape  # of the matrix
    rank: int
    scaling: float
    embedding: bool  # the matrix is [vocabulary, hidden], and A [rank, vocabulary]


class File:
    """The tensors of adapter_model.safetensors, by rows or by columns."""

    def __init__(self, path: Path, direct: bool):
        self.files, self._found = [path], read_header(path)
        self.tensors = {name: place.stored for name, place in self._found.items()}
        self._source = Source(path, Buffers(), direct)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] and contiguous, with rows of a tensor, as it is stored."""
        place = self._found[name]
        self._source.read(place.offset + start * place.stored.row_bytes, as_bytes(out))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[rows, stop - start] of a matrix, as it is stored; of its rows, which may be long, nothing else is read."""
        place = self._found[name]
        found = torch.empty((place.stored.rows, stop - start), dtype=place.stored.dtype)
        for row, out in enumerate(found):
            offset = place.offset + row * place.stored.row_bytes + start * place.stored.dtype.itemsize
            self._source.read(offset, as_bytes(out))
        return found

    def close(self) -> None:
        self._source.close()


class Adapter:
    """The adapter of a folder, or of a checkpoint; itself Weights, of its own tensors. See `open`.

    Args:
        folder: where it is, for messages.
        config: adapter_config.json.
        weights: its tensors, by PEFT's names.

    Attributes:
        files: that it is read from.
        deltas: by the name of the base tensor that they are added to.
        replaced: base tensor -> tensor of the adapter that is there instead of it (modules_to_save).
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], weights: Weights):
        self.folder, self.config, self._weights = folder, config, weights
        self.files: list[Path] = weights.files
        self.tensors = weights.tensors
        self.deltas: dict[str, Delta] = {}
        self.replaced: dict[str, str] = {}
        for name in self.tensors:
            if not name.startswith(PREFIX):
                raise self._refused(name, f"does not begin with {PREFIX}", "save the adapter with PEFT's save_pretrained")
        left = set(self.tensors) - self._take_pairs()
        left -= self._take_whole(left)
        if left:
            rule = f"{len(left)} tensors are nothing that can be merged: {some(sorted(left))}"
            raise Refused(str(folder / TENSORS), rule, "merge the adapter with PEFT's merge_and_unload, and use that model")

    @classmethod
    def open(cls, folder: str | Path, direct: bool = True) -> Adapter:
        """The adapter in `folder`; all of its tensors are looked through once.

        Raises:
            Refused: a file that is missing, a pickle, truncated; anything in adapter_config.json that would be merged
                wrongly; a tensor that is not understood, lacks its other half, has another rank than the config says, or holds
                numbers that are infinite or none.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise Refused(str(folder / CONFIG), "is missing", "name the folder of an adapter that PEFT saved")
        config = read_json(folder / CONFIG)
        _check_config(config)
        pickle = folder / "adapter_model.bin"
        if not (folder / TENSORS).is_file():
            if pickle.is_file():
                rule = "is a pickle, which can run code when it is read; only safetensors are"
                raise Refused(str(pickle), rule, "load it with PEFT, and save it again: save_pretrained writes safetensors")
            raise Refused(str(folder / TENSORS), "is missing", "name the folder of an adapter that PEFT saved")
        adapter = cls(folder, config, File(folder / TENSORS, direct))
        adapter.files = [*adapter.files, folder / CONFIG]
        adapter._check_numbers()
        return adapter

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] and contiguous, with rows of a tensor of the adapter, as it is stored."""
        self._weights.read(name, start, stop, out)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[rows, stop - start] of the matrix of an embedding's adapter, which only a folder has."""
        return self._weights.columns(name, start, stop)

    def linear_ranks(self) -> dict[str, int]:
        """Rank of the adapter of each linear layer, by module such as model.layers.0.self_attn.q_proj.

        Raises:
            Refused: there is something else in the adapter, which can be merged but not be kept beside the base.
        """
        other = [*self.replaced.values(), *(delta.a for delta in self.deltas.values() if delta.embedding)]
        if other:
            rule = f"{len(other)} tensors are not LoRA of a linear layer, so cannot be kept beside the base: {some(other)}"
            raise Refused(str(self.folder / TENSORS), rule, "merge the adapter")
        return {name.removesuffix(".weight"): delta.rank for name, delta in self.deltas.items()}

    def close(self) -> None:
        self._weights.close()

    def _take_pairs(self) -> set[str]:
        """Fill `deltas`; the tensors that they are of."""
        for name in self.tensors:
            for half, other in HALVES.items():
                if name.endswith(half):
                    second = name.removesuffix(half) + other
                    if second not in self.tensors:
                        raise self._refused(name, "has no other half, the A to its B or the B to its A", "save the adapter again")
                    if half in (A, EMBEDDING_A):
                        self._pair(name, second, half == EMBEDDING_A)
        return {name for delta in self.deltas.values() for name in (delta.a, delta.b)}

    def _take_whole(self, names: Collection[str]) -> set[str]:
        """Fill `replaced`; the tensors that are in it."""
        for name in sorted(names):
            base = name.removeprefix(PREFIX)
            base = base.removesuffix(BASE) + ".weight" if base.endswith(BASE) else base
            module, _, kind = base.rpartition(".")
            whole = base in (HF_EMBEDDING, HF_OUTPUT) or _is_of(module, self.config.get("modules_to_save") or ())
            if whole and kind in ("weight", "bias"):
                self.replaced.setdefault(base, name)
        return set(self.replaced.values())

    def _pair(self, a: str, b: str, embedding: bool) -> None:
        module = a.removeprefix(PREFIX).removesuffix(EMBEDDING_A if embedding else A)
        down, up = self.tensors[a].shape, self.tensors[b].shape
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            rule = f"has shapes {list(down)} and {list(up)}, but {CONFIG} makes its rank {rank}"
            raise self._refused(a, rule, "use the adapter_config.json that was saved with it")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        shape = (down[1], up[0]) if embedding else (up[0], down[1])
        self.deltas[f"{module}.weight"] = Delta(a, b, shape, rank, scaling, embedding)

    def _check_numbers(self) -> None:
        for name, stored in self.tensors.items():
            if stored.dtype not in DTYPES:
                raise self._refused(name, f"is stored as {stored.dtype}", "save the adapter in float32 or bfloat16")
            step = max(1, LOOK_BYTES // max(1, stored.row_bytes))
            for start in range(0, stored.rows, step):
                rows = torch.empty((min(step, stored.rows - start), *stored.row_shape), dtype=stored.dtype)
                self.read(name, start, start + len(rows), rows)
                if not rows.isfinite().all():
                    raise self._refused(name, "holds numbers that are infinite or none", "use a checkpoint from before")

    def _refused(self, name: str, rule: str, remedy: str) -> Refused:
        return Refused(f"{self.folder / TENSORS}: {name}", rule, remedy)


class Merged:
    """Weights with an adapter added to them; tensors that it does not touch pass as they are.

    What is read does not depend on which rows are asked for together.

    Args:
        weights: of the model that the adapter was trained beside, not in FP8.
        tied: the output layer is the embedding, so that an adapter of one of them alone cannot be merged.

    Raises:
        Refused: tensors of the adapter that the model has no place for, or one of another shape; modules of the model that
            adapter_config.json says were trained, but of which the adapter has nothing.
    """

    def __init__(self, weights: Weights, adapter: Adapter, tied: bool = False):
        self._weights, self._adapter = weights, adapter
        self.tensors: Mapping[str, Stored] = weights.tensors
        shapes = [(name, adapter.tensors[own].shape) for name, own in adapter.replaced.items()]
        shapes += [(name, delta.shape) for name, delta in adapter.deltas.items()]
        changed = {name for name, _ in shapes}
        where, other = str(adapter.folder / TENSORS), "name the model that the adapter was trained beside"
        if tied and changed & {HF_EMBEDDING, HF_OUTPUT}:
            rule = f"changes {' and '.join(sorted(changed & {HF_EMBEDDING, HF_OUTPUT}))}, but config.json ties them"
            raise Refused(where, rule, "merge it with PEFT's merge_and_unload into a model with tie_word_embeddings=false")
        absent = sorted(changed - set(weights.tensors))
        if absent:
            raise Refused(where, f"is for {len(absent)} tensors that the model does not have: {some(absent)}", other)
        for name, shape in shapes:
            base = weights.tensors[name]
            if base.shape != shape:
                rule = f"is for a tensor {name} of shape {list(shape)}, but the model's is {list(base.shape)}"
                raise Refused(where, rule, other)
            if base.dtype not in DTYPES:
                raise Refused(f"{name} of {base.dtype}", "cannot have an adapter merged", "merge it into bf16, fp16 or fp32")
        lacking = _lacking(adapter, weights.tensors)
        if lacking:
            rule = f"lacks {len(lacking)} modules that {CONFIG} says were trained: {some(lacking)}"
            raise Refused(where, rule, "copy the adapter again, or mend target_modules")

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] of the tensor's dtype, with its rows, the adapter added."""
        own, rows = self._adapter.replaced.get(name), out
        if own is None:
            self._weights.read(name, start, stop, out)
        else:
            rows = torch.empty(out.shape, dtype=self._adapter.tensors[own].dtype)
            self._adapter.read(own, start, stop, rows)
        delta = self._adapter.deltas.get(name)
        if delta is None:
            if rows is not out:
                out.copy_(rows)
            return
        right = self._whole(delta.b).T if delta.embedding else self._whole(delta.a)

        def left(first: int, last: int) -> Tensor:
            return self._adapter.columns(delta.a, first, last).float().T if delta.embedding else self._rows(delta.b, first, last)

        add_product(out, rows, start, delta.shape[0], left, right, delta.scaling)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._adapter.tensors[name]
        rows = torch.empty((stop - start, *stored.row_shape), dtype=stored.dtype)
        self._adapter.read(name, start, stop, rows)
        return rows.float()

    def _whole(self, name: str) -> Tensor:
        return self._rows(name, 0, self._adapter.tensors[name].rows)


def add_product(
    out: Tensor, rows: Tensor, start: int, total: int, left: Callable[[int, int], Tensor], right: Tensor, scaling: float
) -> None:
    """out = rows + s (left @ right), of the rows from `start` on of a matrix of `total`; the one place that merges.

    In fp32, on the CPU, rounded once to the dtype of `out`; always the same ROWS are multiplied at once.

    Args:
        out: [n, columns], may be `rows`.
        left: gives its rows `first` to `last`, [last - first, r] in fp32.
        right: [r, columns] in fp32.
    """
    stop = start + len(out)
    for row in range(start // ROWS * ROWS, stop, ROWS):
        product = (left(row, min(row + ROWS, total)) @ right).mul_(scaling)
        low, high = max(start, row), min(stop, row + len(product))
        at = slice(low - start, high - start)
        out[at] = product[low - row : high - row].add_(rows[at])


def _lacking(adapter: Adapter, tensors: Mapping[str, Stored]) -> list[str]:
    """Modules of the model that target_modules or modules_to_save is about, but of which the adapter has nothing.

    Experts count only if it has some of the same projection: transformers 5 has no modules for them that PEFT could target.
    """
    config, there = adapter.config, {name.rpartition(".")[0] for name in (*adapter.deltas, *adapter.replaced)}
    kinds = {NUMBER.sub(".", module) for module in there}
    lacking = []
    for name, stored in tensors.items():
        module = name.removesuffix(".weight")
        if module in there or module == name:
            continue
        wanted = len(stored.shape) == 2 and _is_target(module, config) and (
            ".experts." not in module or NUMBER.sub(".", module) in kinds
        )  # fmt: skip
        if wanted or _is_of(module, config.get("modules_to_save") or ()):
            lacking.append(module)
    return lacking


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT takes the module for one of target_modules (peft/tuners/tuners_utils.py: check_target_module_exists)."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear" or (excluded and _matches(module, excluded)) or not _matches(module, targets):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _matches(module: str, names: str | Sequence[str]) -> bool:
    """Whether a regular expression is of all of the name, or one of several names of its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _is_of(module: str, saved: Sequence[str]) -> bool:
    """Whether the module is one of those that are saved whole, or in one. PEFT compares the ends of names, even within a word."""
    parts = module.split(".")
    return any(".".join(parts[:count]).endswith(tuple(saved)) for count in range(1, len(parts) + 1))


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unmergeable("peft_type", config.get("peft_type"), "must be LORA")
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if not _is_positive(config.get(key)):
            raise _unmergeable(key, config.get(key), "must be a positive number")
        _check_pattern(patterns, config.get(patterns) or {})
    if config.get("bias", "none") != "none":
        raise _unmergeable("bias", config["bias"], "must be none: biases of the base were trained, too")
    if config.get("init_lora_weights") not in INITS:
        raise _unmergeable("init_lora_weights", config["init_lora_weights"], "changed the base weights before training began")
    for key, value in config.items():
        if value and key not in USED | NO_MATTER:
            raise _unmergeable(key, value, "is not plain LoRA, and would be merged wrongly")


def _check_pattern(key: str, patterns: Any) -> None:
    if not isinstance(patterns, Mapping) or not all(map(_is_positive, patterns.values())):
        raise _unmergeable(key, patterns, "must map patterns to positive numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise _unmergeable(key, patterns, f"has {pattern!r}, which is no regular expression ({error})") from None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _unmergeable(key: str, value: Any, rule: str) -> Refused:
    return Refused(f"{CONFIG}: {key}={value}", rule, "merge the adapter with PEFT's merge_and_unload, and use that model")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that PEFT takes to be of the module: a regular expression for the end of its name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
