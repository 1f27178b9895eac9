"""A Hugging Face folder into a torch_dist checkpoint that Megatron loads under any split. No model is built.

OUT/config.json, tokenizer, ...          as in the Hugging Face folder: OUT can be a run's model.path
OUT/release/                             the checkpoint: .metadata, common.pt, metadata.json, *.distcp
OUT/carried.safetensors                  what the model has beside its language model, such as a vision tower
OUT/latest_checkpointed_iteration.txt    "release": Megatron-LM's --load OUT
OUT/conversion.json                      what was done, with the hash of every tensor
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megapsft.checkpoint.carried import target_of
from megapsft.checkpoint.convert.run import Conversion, Result, convert
from megapsft.checkpoint.convert.target import Target, Together
from megapsft.checkpoint.convert.to_safetensors import ADAPTER
from megapsft.checkpoint.convert.to_torch_dist import TorchDistTarget
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.hf_folder import (
    NOT_WEIGHTS,
    RELEASE,
    Carried,
    check_keys,
    check_tied,
    in_full,
    open_carried,
    read_config,
)
from megapsft.checkpoint.hf_save import companions, copy_companions, lacks, write_config
from megapsft.checkpoint.weights import Weights
from megapsft.checkpoint.weights.beside import Beside
from megapsft.checkpoint.weights.cast import Cast
from megapsft.checkpoint.weights.hashed import Hashed
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.checkpoint.weights.lora import CONFIG as ADAPTER_CONFIG
from megapsft.checkpoint.weights.lora import Adapter, Merged
from megapsft.checkpoint.weights.part import carried, language_model
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.errors import Refused
from megapsft.models.adapters import adapter_rules
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import HF_OUTPUT
from megapsft.models.parameters import Rule

LATEST = "latest_checkpointed_iteration.txt"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def hf_to_megatron(
    hf_dir: Path,
    out: Path,
    dtype: str | None = None,
    adapter_dir: Path | None = None,
    keep_adapter: bool = False,
    options: Options | None = None,
) -> Result:
    """Convert the folder `hf_dir` to `out`.

    Args:
        dtype: bf16, fp16 or fp32; None: as stored, FP8 as bf16. What is carried along keeps its own.
        adapter_dir: a LoRA adapter as PEFT saves it, which is merged.
        keep_adapter: do not merge it, but keep it beside the base.

    Raises:
        Refused: a folder that is not whole, does not fit its config, or is of a family that is not known; and what `convert`
            refuses. Nothing is written then.
    """
    options = options or Options()
    hf = read_config(hf_dir)
    family = family_of(hf)
    rules = family.parameters(hf)
    stored = HFWeights(hf_dir, options.direct, family.spelling)
    sources = Hashed(stored)
    weights = in_full(language_model(sources, family), hf, DTYPES[dtype or "bf16"])
    part = carried(sources, family)
    check_keys(rules, {name: tensor.shape for name, tensor in weights.tensors.items()}, hf.tie_word_embeddings)
    if hf.tie_word_embeddings:
        check_tied(stored)
    if dtype is not None and any(tensor.dtype != DTYPES[dtype] for tensor in weights.tensors.values()):
        weights = Cast(weights, DTYPES[dtype])
    if keep_adapter and adapter_dir is None:
        raise Refused("--keep-adapter", "keeps the adapter of --adapter, which is not given", "give --adapter, or leave it out")
    if adapter_dir is not None and part is not None:
        rule = f"is not merged into {hf.architecture}, whose modules PEFT calls otherwise than its files do"
        raise Refused(f"--adapter {adapter_dir}", rule, "merge it with PEFT's merge_and_unload, and convert that model")
    adapter = Adapter.open(adapter_dir, options.direct) if adapter_dir is not None else None
    beside: tuple[Rule, ...] = ()
    if adapter is not None:
        merged = Merged(weights, adapter, hf.tie_word_embeddings)  # which checks that it belongs to the model
        beside = adapter_rules(hf, adapter.linear_ranks()) if keep_adapter else ()
        weights = Beside(weights, adapter) if keep_adapter else merged
    names = [name for rule in rules for name in rule.sources]
    dtypes = {weights.tensors[name].dtype for name in names}
    if len(dtypes) > 1:
        found = ", ".join(sorted(str(found).removeprefix("torch.") for found in dtypes))
        raise Refused(str(hf_dir), f"stores tensors in several dtypes ({found})", "give --dtype, such as --dtype bf16")
    skipped = [name for name in stored.tensors if name.endswith(NOT_WEIGHTS)]
    twice = hf.tie_word_embeddings and HF_OUTPUT in stored.tensors
    kept = dtypes.pop()
    needed = {name: weights.tensors[name] for name in (*names, *(name for rule in beside for name in rule.sources))}
    if part is not None:
        weights = Beside(weights, part)

    def target(folder: Path) -> Target:
        megatron = TorchDistTarget(folder / RELEASE, needed, hf, options.direct, beside)
        return megatron if part is None else Together(megatron, target_of(Carried(part, stored), folder, options.direct))

    def finish(folder: Path) -> None:
        write_config(hf, kept, folder)
        copy_companions(hf_dir, folder)
        if keep_adapter:
            (folder / ADAPTER).mkdir(exist_ok=True)
            shutil.copyfile(adapter_dir / ADAPTER_CONFIG, folder / ADAPTER / ADAPTER_CONFIG)
        (folder / LATEST).write_text(RELEASE + "\n")

    plan = Conversion(
        weights=weights,
        sources=sources,
        source_files=[*stored.files, hf_dir / "config.json", *(adapter.files if adapter is not None else ())],
        target=target,
        reopen=lambda folder: as_written(folder / RELEASE, folder, hf, options),
        finish=finish,
        about={
            "direction": "hf-to-megatron",
            "architecture": hf.architecture,
            "dtype": str(kept).removeprefix("torch."),
            "adapter": None if adapter is None else ("kept beside" if keep_adapter else "merged"),
            "skipped": skipped,
            "output_layer_stored_twice": twice,
            "companions": companions(hf_dir),
        },
        checks=[
            f"every one of {len(stored.tensors)} tensors is used once or skipped by name",
            f"every one of {len(rules)} parameters is made once, in the shape that config.json says",
        ],
        warnings=lacks(hf_dir),
        options=options,
    )
    return convert(plan, out)


def as_written(checkpoint: Path, model: Path, hf: HFConfig, options: Options) -> DistWeights | Beside:
    """The weights in a checkpoint, those of the adapter that it keeps beside them, and what the folder `model` carries along."""
    base = DistWeights(checkpoint, hf, options.direct)
    more: list[Weights] = []
    if base.has_adapter:
        more.append(DistWeights(checkpoint, hf, options.direct, adapter=True))
    found = open_carried(model, family_of(hf), options.direct)
    if found is not None:
        more.append(found.part)
    return Beside(base, *more) if more else base
