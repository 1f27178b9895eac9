"""A Hugging Face model folder as it is read: its config, and its safetensors with every key and shape accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapsft.errors import Refused
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import Index, Rule, Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NOT_WEIGHTS = (".rotary_emb.inv_freq",)  # buffers that old versions of transformers saved
SHOWN = 5  # names in a message


def read_config(model_dir: str | Path) -> HFConfig:
    """The config of the model in `model_dir`.

    Raises:
        Refused: no such folder, no config.json in it, not JSON, or what `HFConfig.parse` refuses.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        remedy = "name a local folder with config.json and *.safetensors, such as one made by `hf download`"
        raise Refused(f"model folder {str(folder)!r}", "is not a folder", remedy)
    return HFConfig.parse(_read_json(folder / "config.json"))


class HFCheckpoint:
    """The tensors of a folder; nothing but headers is read until `read` asks for a part of one."""

    def __init__(self, files: Mapping[str, Path]):
        """Args: files: which file each tensor lies in. Use `open_checkpoint`, which checks them."""
        self._handles = {path: _open(path) for path in dict.fromkeys(files.values())}
        self._slices: dict[str, Any] = {name: self._handles[path].get_slice(name) for name, path in files.items()}
        self.shapes: dict[str, Shape] = {name: tuple(part.get_shape()) for name, part in self._slices.items()}
        for name, part in self._slices.items():
            if part.get_dtype() not in DTYPES:
                rule = f"is stored as {part.get_dtype()}, which would be read without its scales"
                raise Refused(f"{files[name]}: {name}", rule, "use the checkpoint in bfloat16")

    def read(self, name: str, index: Index) -> Tensor:
        """A part of a tensor, in the dtype it is stored in."""
        return self._slices[name][index]


def open_checkpoint(model_dir: str | Path) -> HFCheckpoint:
    """The safetensors of `model_dir`: model.safetensors, or what model.safetensors.index.json lists.

    Raises:
        Refused: no safetensors (pickles are not read), a file that the index lists but is not there, a truncated or corrupt
            file, tensors that the index lists but their file lacks, tensors of a dtype other than float32, float16, bfloat16.
    """
    folder = Path(model_dir)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return HFCheckpoint(dict.fromkeys(_open(single).keys(), single))
    if index.is_file():
        files = {name: folder / file for name, file in _read_json(index).get("weight_map", {}).items()}
        for path in dict.fromkeys(files.values()):
            if not path.is_file():
                raise Refused(str(path), f"is missing, but {index} lists it", "download or copy the folder again")
            listed = {name for name, file in files.items() if file == path}
            lacking = sorted(listed - set(_open(path).keys()))
            if lacking:
                rule = f"lacks tensors that {INDEX} lists in it: {_some(lacking)}"
                raise Refused(str(path), rule, "download or copy the folder again")
        return HFCheckpoint(files)
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        remedy = f"convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...) writes safetensors"
        raise Refused(str(pickles[0]), "is a pickle, which can run code when it is read; only safetensors are", remedy)
    raise Refused(str(folder), f"has neither {SINGLE} nor {INDEX}", "name a folder with the weights in it")


def check_checkpoint(model_dir: str | Path, family: Family, hf: HFConfig) -> HFCheckpoint:
    """The checkpoint in `model_dir`, with every tensor that the model needs, no other, and all shapes right.

    Raises:
        Refused: what `open_checkpoint`, `check_keys` and `check_tied` refuse.
    """
    checkpoint = open_checkpoint(model_dir)
    check_keys(family.parameters(hf), checkpoint.shapes, hf.tie_word_embeddings)
    if hf.tie_word_embeddings:
        check_tied(checkpoint)
    return checkpoint


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
        rule = f"{len(missing)} tensors are missing that config.json asks for: {_some(missing)}"
        remedy = "set tie_word_embeddings in config.json if they are tied" if missing == [LM_HEAD] else "download it again"
        raise Refused("checkpoint", rule, remedy + ", or name the checkpoint that belongs to this config.json")
    ignored = {LM_HEAD} if tied else set()
    extra = [name for name in found if name not in needed and name not in ignored and not name.endswith(NOT_WEIGHTS)]
    if extra:
        rule = f"{len(extra)} tensors are not part of the model that config.json describes: {_some(extra)}"
        raise Refused("checkpoint", rule, "name the checkpoint that belongs to this config.json")
    for name, shape in needed.items():
        if found[name] != shape:
            rule = f"has shape {list(found[name])}, but config.json makes it {list(shape)}"
            raise Refused(name, rule, "name the checkpoint that belongs to this config.json")


def check_tied(checkpoint: HFCheckpoint, block: int = 8192) -> None:
    """That a `lm_head.weight` stored along with tied embeddings is the same tensor; compared `block` rows at a time.

    Raises:
        Refused: it differs, so that the model was not tied after all.
    """
    if LM_HEAD not in checkpoint.shapes:
        return
    same = checkpoint.shapes[LM_HEAD] == checkpoint.shapes[EMBEDDING] and all(
        torch.equal(checkpoint.read(LM_HEAD, rows), checkpoint.read(EMBEDDING, rows))
        for rows in (slice(start, start + block) for start in range(0, checkpoint.shapes[EMBEDDING][0], block))
    )
    if not same:
        rule = f"differs from {EMBEDDING}, but config.json ties them"
        raise Refused(LM_HEAD, rule, "set tie_word_embeddings to false, or delete the tensor that is wrong")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        rule = f"is truncated or not safetensors ({error})"
        raise Refused(str(path), rule, "download or copy the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refused(str(path), "is missing", "name a complete Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise Refused(str(path), f"is not readable JSON ({error})", "download or copy the file again") from None
    if not isinstance(content, dict):
        raise Refused(str(path), f"holds a JSON {type(content).__name__}, not an object", "download or copy the file again")
    return content


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
