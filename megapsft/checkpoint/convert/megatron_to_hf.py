"""A torch_dist checkpoint, saved under any split, into a Hugging Face folder. No model is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from megapsft.checkpoint.adapters import adapter_of, base_of, merged, merges_adapters
from megapsft.checkpoint.convert.hf_to_megatron import DTYPES, LATEST
from megapsft.checkpoint.convert.run import Conversion, Result, convert
from megapsft.checkpoint.convert.to_safetensors import ADAPTER, ADAPTER_FILE, SafetensorsTarget
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.hf_folder import RELEASE, open_carried, read_config
from megapsft.checkpoint.hf_save import companions, copy_companions, lacks, stores_output_layer, write_config
from megapsft.checkpoint.state import STATE, check_architecture, read_state
from megapsft.checkpoint.weights import Weights
from megapsft.checkpoint.weights.beside import Beside
from megapsft.checkpoint.weights.cast import Cast, Tied
from megapsft.checkpoint.weights.fp8 import Quantised, linear_weights, quantization_config
from megapsft.checkpoint.weights.hashed import Hashed
from megapsft.checkpoint.weights.hf import AS_HERE, FileWeights, HFWeights
from megapsft.checkpoint.weights.lora import CONFIG as ADAPTER_CONFIG
from megapsft.checkpoint.weights.part import Part
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.names import Spelling

SHARD_BYTES = 5 * 10**9  # as Hugging Face has them


class Found(NamedTuple):
    """A checkpoint, and the folder that has its config and tokenizer."""

    checkpoint: Path
    model: Path


def megatron_to_hf(
    megatron: Path,
    out: Path,
    hf_dir: Path | None = None,
    dtype: str | None = None,
    fp8_blockwise: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    options: Options | None = None,
    base: Path | None = None,
) -> Result:
    """Convert the checkpoint that `find` finds at `megatron` to `out`. Adapters of a run are merged into what they are beside.

    Args:
        hf_dir: folder with the config, the tokenizer and what is carried along; None: what the run, or the import, says.
        dtype: bf16, fp16 or fp32; None: as stored. What is carried along keeps its own.
        fp8_blockwise: linear layers in FP8, with a scale for each block of 128 x 128.
        base: of a run that trained adapters, the model that it started from; None: where the run found it.

    Raises:
        Refused: a checkpoint that is not whole or not of this model; and what `convert` refuses. Nothing is written then.
    """
    options = options or Options()
    found = find(megatron, hf_dir)
    hf = read_config(found.model)
    state: dict[str, Any] = {}
    if (found.checkpoint / STATE).is_file():
        state = read_state(found.checkpoint)
        check_architecture(found.checkpoint, state, hf)
    merges = merges_adapters(state)
    stored = DistWeights(found.checkpoint, hf, options.direct, adapter=merges)
    carried = open_carried(found.model, family_of(hf), options.direct)
    if carried is not None and fp8_blockwise:
        rule = f"would say of all of {hf.architecture} that it is in FP8, and what is carried along is not"
        raise Refused("--fp8-blockwise", rule, "leave it out")
    own = base_of(found.checkpoint, state, found.model, hf, base) if merges else stored
    sources = Hashed(own if carried is None else Beside(own, carried.part))
    weights: Weights = sources if carried is None else Part(sources, own.tensors)
    if merges:
        weights = merged(weights, adapter_of(stored, found.model), DTYPES.get(dtype), hf)
    elif dtype is not None and any(tensor.dtype != DTYPES[dtype] for tensor in weights.tensors.values()):
        weights = Cast(weights, DTYPES[dtype])
    if hf.tie_word_embeddings and stores_output_layer(found.model):
        weights = Tied(weights)
    kept = next(iter(weights.tensors.values())).dtype
    if fp8_blockwise:
        weights = Quantised(weights, linear_weights(hf))
    if carried is not None:
        weights = Beside(weights, Part(sources, carried.part.tensors))
    spelling = AS_HERE if carried is None else carried.stored.spelling
    plain, adapter = weights.tensors, None
    if not merges and stored.has_adapter:
        adapter = DistWeights(found.checkpoint, hf, options.direct, adapter=True)
        weights = Beside(weights, adapter)
        if not (found.model / ADAPTER / ADAPTER_CONFIG).is_file():
            rule = f"keeps an adapter, but there is no {ADAPTER}/{ADAPTER_CONFIG} in {found.model}, which says how it is scaled"
            raise Refused(str(found.checkpoint), rule, "put the file there that PEFT saved with the adapter")

    def finish(folder: Path) -> None:
        write_config(hf, kept, folder, quantization_config(hf) if fp8_blockwise else None)
        copy_companions(found.model, folder)
        if adapter is not None:
            shutil.copyfile(found.model / ADAPTER / ADAPTER_CONFIG, folder / ADAPTER / ADAPTER_CONFIG)

    plan = Conversion(
        weights=weights,
        sources=sources,
        source_files=[
            *stored.files,
            found.checkpoint / ".metadata",
            found.model / "config.json",
            *(carried.stored.files if carried is not None else ()),
        ],
        target=lambda folder: SafetensorsTarget(
            folder,
            plain,
            max_shard_bytes,
            options.direct,
            None if adapter is None else {ADAPTER_FILE: adapter.tensors},
            spelling,
        ),
        reopen=lambda folder: _reopen(folder, adapter is not None, spelling, options),
        finish=finish,
        about={
            "direction": "megatron-to-hf",
            "architecture": hf.architecture,
            "dtype": str(kept).removeprefix("torch."),
            "fp8_blockwise": fp8_blockwise,
            "adapter": "merged" if merges else None if adapter is None else "kept beside",
            "checkpoint": found.checkpoint.name,
            "max_shard_bytes": max_shard_bytes,
            "companions": companions(found.model),
            **{name: state[name] for name in ("step", "update") if name in state},
        },
        checks=[
            f"every one of {len(stored.tensors)} tensors is covered once by the checkpoint's chunks",
            "no parameter of the checkpoint is left over",
        ],
        warnings=lacks(found.model),
        options=options,
    )
    return convert(plan, out)


def _reopen(folder: Path, adapter: bool, spelling: Spelling, options: Options) -> Weights:
    base = HFWeights(folder, options.direct, spelling)
    return Beside(base, FileWeights(folder / ADAPTER_FILE, options.direct)) if adapter else base


def find(path: Path, hf_dir: Path | None = None) -> Found:
    """The checkpoint at `path`: of a run or its folder, of an import, or of Megatron-LM's --save.

    Raises:
        Refused: there is none, or it is not said where the model's config is.
    """
    path = Path(path)
    if not path.exists():
        raise Refused(str(path), "is not there", _beside(path))
    checkpoint = path.resolve()
    if (path / "config.yaml").is_file():
        checkpoint = (path / "checkpoints" / "latest").resolve()
        if not checkpoint.exists():
            raise Refused(str(path), "is a run without a checkpoint", "train a step first")
    elif (path / LATEST).is_file():
        name = (path / LATEST).read_text().strip()
        if name != RELEASE and not name.isdecimal():
            rule = f"holds {name[:40]!r}, which is no iteration"
            raise Refused(str(path / LATEST), rule, f"write the number of a checkpoint to it, or {RELEASE}")
        checkpoint = (path / (name if name == RELEASE else f"iter_{int(name):07d}")).resolve()
    return Found(checkpoint, Path(hf_dir) if hf_dir is not None else _model_of(checkpoint))


def _model_of(checkpoint: Path) -> Path:
    """The folder with the config of the model that a checkpoint is of."""
    if (checkpoint.parent / "config.json").is_file():
        return checkpoint.parent
    run = checkpoint.parent.parent
    if (run / "config.yaml").is_file():
        return model_of_run(run)
    rule = "does not say which model it is a checkpoint of"
    raise Refused(str(checkpoint), rule, "give --hf, the Hugging Face folder that it started from")


def model_of_run(run: Path) -> Path:
    """The folder of the model that a run trained."""
    kept = run / "model"
    return kept if (kept / "config.json").is_file() else Path(load_config(run / "config.yaml").model.path)


def _beside(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*") if p.is_dir() and not p.name.endswith(".partial"))
    return "use one of " + ", ".join(there[:10]) if there else "name a folder such as RUN/checkpoints/latest"
