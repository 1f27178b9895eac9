"""A stream of Hugging Face tensors, as a live model gives it, into a model folder; and what a folder holds beside weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.checkpoint.carried import copy_tensors, keep_carried
from megapsft.checkpoint.convert.to_safetensors import SafetensorsTarget
from megapsft.checkpoint.files.direct import as_bytes
from megapsft.checkpoint.hf_folder import is_hf, open_carried, read_config
from megapsft.checkpoint.together import refuse_together
from megapsft.checkpoint.unfinished import Unfinished, check_free
from megapsft.checkpoint.weights import Stored
from megapsft.checkpoint.weights.hf import AS_HERE, HFWeights, read_json
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import TEXT, HFConfig, both_spellings
from megapsft.models.names import HF_EMBEDDING, HF_OUTPUT

COMPANIONS = (  # what a model folder holds beside config and weights
    "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
SOURCE, MANIFEST = "source.json", "conversion.json"  # of a model that a run keeps, of one that was converted
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
READABLE = 0o644  # safetensors makes files that only their owner can read


def save_hf(
    stream: Iterable[tuple[str, Tensor | None]],
    hf: HFConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the tensors, the config and the tokenizer of a model as Hugging Face does. Collective where torch.distributed runs.

    Rank 0 writes, the others exhaust the stream; all return when the folder is there. It is written beside `out_dir` as
    `.NAME.partial` and renamed at the end. Memory: one tensor.

    Args:
        stream: (name, tensor on the CPU), all of one dtype; None instead of the tensor on ranks other than 0.
        source_dir: where tokenizer, chat template and generation config are copied from, and what the family carries along
            beside its language model; names are spelt as there. With tied embeddings, lm_head.weight is written only if it is
            stored there.
        max_shard_bytes: a file of weights has no more than this, unless it is one tensor.
        dtype: of the weights; None: that of the tensors. What is carried along keeps its own.

    Raises:
        Refused: `out_dir` is a file or a folder that is not empty; the stream lacks a tensor, or has one of another dtype; what
            `open_carried` refuses of the source.
    """
    out = Path(out_dir)
    refuse_together(lambda: check_free(out))
    if dist.is_initialized() and dist.get_rank() > 0:
        for _ in stream:
            pass
    else:
        unfinished = Unfinished(out)
        unfinished.empty()
        try:
            stored = _write(stream, hf, Path(source_dir), unfinished.folder, max_shard_bytes, dtype)
            write_config(hf, stored, unfinished.folder)
            copy_companions(Path(source_dir), unfinished.folder)
            unfinished.finish()
        except BaseException:
            unfinished.discard()
            raise
    if dist.is_initialized():
        dist.barrier()


def write_config(hf: HFConfig, dtype: torch.dtype, folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """config.json for weights of `dtype`, spelt so that transformers 4 and 5 both read it right.

    Args:
        dtype: of what is not quantised.
        quantization: quantization_config of weights in FP8; None: there are none, even if the model started from some.
    """
    said = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    config = both_spellings({**hf.raw, **said})
    if config.get(TEXT):
        config[TEXT] |= said
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Tokenizer, chat template and generation config, as far as `source` has them; their names."""
    names = companions(source)
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, folder / name)
    return names


def companions(source: Path) -> list[str]:
    """Names of what `copy_companions` copies."""
    return [name for name in COMPANIONS if (source / name).exists()]


def lacks(source: Path) -> list[str]:
    """What a model folder has not that its weights need none of, but a run does; worded for the user."""
    if not any((source / name).is_file() for name in TOKENIZERS):
        return [f"{source} has no tokenizer ({', '.join(TOKENIZERS)}), so the result has none: put one beside its config.json"]
    settings = source / "tokenizer_config.json"
    told = any((source / name).exists() for name in TEMPLATES) or settings.is_file() and "chat_template" in read_json(settings)
    if not told:
        remedy = f"put a {TEMPLATES[0]} beside its config.json before it is trained"
        return [f"{source} has no chat template, so the result has none: {remedy}"]
    return []


def keep_model(source: Path, folder: Path) -> None:
    """What an export needs beside the weights, so that it needs nothing from elsewhere. What is there already stays."""
    if (folder / SOURCE).is_file():
        return
    folder.mkdir(exist_ok=True)
    copy_companions(source, folder)
    keep_carried(source, family_of(read_config(source)), folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
    about = {"path": str(source.absolute()), "output_layer_stored_twice": stores_output_layer(source)}
    (folder / SOURCE).write_text(json.dumps(about) + "\n")


def stores_output_layer(model: Path) -> bool:
    """Whether the embedding of a model with tied embeddings was stored a second time, as its output layer."""
    for name in (SOURCE, MANIFEST):
        if (model / name).is_file() and "output_layer_stored_twice" in (about := read_json(model / name)):
            return bool(about["output_layer_stored_twice"])
    return is_hf(model) and HF_OUTPUT in HFWeights(model, direct=False).tensors


def _write(
    stream: Iterable[tuple[str, Tensor | None]],
    hf: HFConfig,
    source: Path,
    folder: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """The safetensors of a stream; gives the dtype of the weights."""
    twice, beside = hf.tie_word_embeddings and stores_output_layer(source), open_carried(source, family_of(hf))
    target, left = None, set()
    for name, tensor in stream:
        if target is None:
            dtype = dtype or tensor.dtype
            tensors = {n: Stored(s, dtype) for rule in family_of(hf).parameters(hf) for n, s in rule.sources.items()}
            if twice:
                tensors[HF_OUTPUT] = tensors[HF_EMBEDDING]
            left, spelling = set(tensors), AS_HERE
            if beside is not None:
                tensors, spelling = {**tensors, **beside.part.tensors}, beside.stored.spelling
            target = SafetensorsTarget(folder, tensors, max_shard_bytes, direct=False, spelling=spelling)
            target.open()
        for stored_as in (name, HF_OUTPUT) if twice and name == HF_EMBEDDING else (name,):
            left.remove(stored_as)
            target.write(stored_as, 0, as_bytes(tensor.to(dtype).contiguous()))
    if target is None or left:
        raise Refused("the model", f"gave no {', '.join(sorted(left)) or 'tensors'}", "build it with the family's own layers")
    if beside is not None:
        copy_tensors(beside.part, target)
    target.close()
    return dtype
