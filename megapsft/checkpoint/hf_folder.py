"""A model folder as it is read: its config, and its weights with every key and shape accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megapsft.checkpoint.weights import Weights, rows_of
from megapsft.checkpoint.weights.fp8 import BLOCK, FP8, SCALE, Dequantised
from megapsft.checkpoint.weights.hf import INDEX, SINGLE, FileWeights, HFWeights, numbered, read_json, some
from megapsft.checkpoint.weights.part import Part, carried, language_model
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.errors import Refused
from megapsft.models.families import check_known
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import HF_EMBEDDING, HF_OUTPUT
from megapsft.models.parameters import Index, Rule, Shape

CARRIED = "carried.safetensors"  # beside a config without safetensors: what `open_carried` opens
RELEASE = "release"  # what Megatron calls a checkpoint that no training step made
NOT_WEIGHTS = (".rotary_emb.inv_freq",)  # buffers that old versions of transformers saved


def read_config(model_dir: str | Path) -> HFConfig:
    """The config of the model in `model_dir`.

    Raises:
        Refused: no such folder, no config.json in it, not JSON, or what `check_known` and `HFConfig.parse` refuse.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        remedy = "name a local folder with config.json and *.safetensors, such as one made by `hf download`"
        raise Refused(f"model folder {str(folder)!r}", "is not a folder", remedy)
    raw = read_json(folder / "config.json")
    check_known(raw)
    return HFConfig.parse(raw)


class ModelWeights:
    """The weights of a folder, by any index; nothing but headers is read until `read` asks for a part of a tensor."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.shapes: dict[str, Shape] = {name: stored.shape for name, stored in weights.tensors.items()}

    def read(self, name: str, index: Index) -> Tensor:
        """A part of a tensor, in the dtype it is stored in."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.weights.tensors[name].rows)
        if step != 1:
            raise ValueError(f"rows are read one after the other, not by steps of {step}")
        found = rows_of(self.weights, name, start, max(start, stop))
        return found[:, *columns] if columns else found


class Carried(NamedTuple):
    """Tensors beside a language model, and the files that they lie in, perhaps among others."""

    part: Part
    stored: FileWeights


def open_checkpoint(model_dir: str | Path) -> ModelWeights:
    """The safetensors of `model_dir`: model.safetensors, or what model.safetensors.index.json lists.

    Raises:
        Refused: what `HFWeights` refuses.
    """
    return ModelWeights(HFWeights(model_dir, direct=False))


def check_checkpoint(model_dir: str | Path, family: Family, hf: HFConfig) -> ModelWeights:
    """The weights in `model_dir`, with every tensor that the model needs, no other, and all shapes right.

    Args:
        model_dir: a Hugging Face folder, or one that `megapsft convert hf-to-megatron` made.

    Raises:
        Refused: what `HFWeights`, `check_keys` and `check_tied`, or for a converted folder `DistWeights`, refuse; what the
            family carries along is not there.
    """
    if is_converted(model_dir):
        stored = DistWeights(Path(model_dir) / RELEASE, hf, direct=False)
        if stored.has_adapter:
            rule = "keeps an adapter beside the base, which would be left out here"
            raise Refused(str(model_dir), rule, "convert again without --keep-adapter, which merges it")
        open_carried(model_dir, family)
        return ModelWeights(stored)
    found = HFWeights(model_dir, direct=False, spelling=family.spelling)  # not direct: all ranks of a node read it
    carried(found, family)
    weights = in_full(language_model(found, family), hf)
    check_keys(family.parameters(hf), {name: stored.shape for name, stored in weights.tensors.items()}, hf.tie_word_embeddings)
    if hf.tie_word_embeddings:
        check_tied(weights)
    return ModelWeights(weights)


def open_carried(model_dir: str | Path, family: Family, direct: bool = False) -> Carried | None:
    """What the model of the folder has beside its language model; None where its family has nothing of it.

    Raises:
        Refused: it is not there, or what `carried` refuses.
    """
    if family.carried is None:
        return None
    folder = Path(model_dir)
    if (folder / CARRIED).is_file():
        weights = FileWeights(folder / CARRIED, direct, family.spelling)
    elif is_hf(folder):
        weights = HFWeights(folder, direct, family.spelling)
    else:
        rule = f"has neither {CARRIED} nor safetensors with what {family.architecture} has beside its language model"
        raise Refused(str(folder), rule, "name the Hugging Face folder that it started from, or copy it again")
    return Carried(carried(weights, family), weights)


def in_full(weights: Weights, hf: HFConfig, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """The weights with those in FP8 times their scales, as `dtype`.

    Raises:
        Refused: FP8 weights without scales, or scales without weights.
    """
    if not any(stored.dtype == FP8 or name.endswith(SCALE) for name, stored in weights.tensors.items()):
        return weights
    return Dequantised(weights, dtype, hf.fp8_block or BLOCK)


def is_converted(model_dir: str | Path) -> bool:
    """Whether the folder holds a torch_dist checkpoint beside its config, rather than safetensors."""
    return (Path(model_dir) / RELEASE).is_dir()


def is_hf(model_dir: str | Path) -> bool:
    """Whether the folder holds a config beside safetensors."""
    folder = Path(model_dir)
    weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file() or bool(numbered(folder))
    return (folder / "config.json").is_file() and weights


def check_keys(rules: Sequence[Rule], found: Mapping[str, Shape], tied: bool) -> None:
    """That a checkpoint holds exactly the tensors that the rules use, in their shapes.

    Args:
        found: shape of every tensor in the checkpoint.
        tied: the output layer is the embedding, so that `lm_head.weight` may be there, and counts for nothing.

    Raises:
        Refused: tensors missing, tensors that no rule uses, or another shape than config.json says.
    """
    needed = {name: shape for rule in rules for name, shape in rule.sources.items()}
    missing = [name for name in needed if name not in found]
    if missing:
        rule = f"{len(missing)} tensors are missing that config.json asks for: {some(missing)}"
        remedy = "set tie_word_embeddings in config.json if they are tied" if missing == [HF_OUTPUT] else "download it again"
        raise Refused("checkpoint", rule, remedy + ", or name the checkpoint that belongs to this config.json")
    ignored = {HF_OUTPUT} if tied else set()
    extra = [name for name in found if name not in needed and name not in ignored and not name.endswith(NOT_WEIGHTS)]
    if extra:
        rule = f"{len(extra)} tensors are not part of the model that config.json describes: {some(extra)}"
        raise Refused("checkpoint", rule, "name the checkpoint that belongs to this config.json")
    for name, shape in needed.items():
        if found[name] != shape:
            rule = f"has shape {list(found[name])}, but config.json makes it {list(shape)}"
            raise Refused(name, rule, "name the checkpoint that belongs to this config.json")


def check_tied(weights: Weights, nbytes: int = 2**22) -> None:
    """That a `lm_head.weight` stored along with tied embeddings is the same tensor; compared `nbytes` at a time.

    Raises:
        Refused: it differs, so that the model was not tied after all.
    """
    if HF_OUTPUT not in weights.tensors:
        return
    rows = weights.tensors[HF_EMBEDDING].rows
    block = max(1, nbytes // weights.tensors[HF_EMBEDDING].row_bytes)

    def same(start: int) -> bool:
        ends = min(start + block, rows)
        output, embedding = (rows_of(weights, name, start, ends) for name in (HF_OUTPUT, HF_EMBEDDING))
        return torch.equal(output.view(torch.uint8), embedding.view(torch.uint8))

    alike = weights.tensors[HF_OUTPUT] == weights.tensors[HF_EMBEDDING]
    if not alike or not all(same(start) for start in range(0, rows, block)):
        rule = f"differs from {HF_EMBEDDING}, but config.json ties them"
        raise Refused(HF_OUTPUT, rule, "set tie_word_embeddings to false, or delete the tensor that is wrong")


__all__ = ["CARRIED", "INDEX", "RELEASE", "SINGLE", "Carried", "ModelWeights", "check_checkpoint", "check_keys", "check_tied",
           "is_converted", "is_hf", "open_carried", "open_checkpoint", "read_config"]  # fmt: skip
