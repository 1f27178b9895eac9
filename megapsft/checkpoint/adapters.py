"""The adapters of a run with LoRA: beside which base they are, merged into it, and as a folder that PEFT reads.

A checkpoint of such a run has the adapters and their optimizer, and not what they are beside: that never changes, and would be
nearly all of it. It lies in `model.path`, and the checkpoint knows it again by its `identity`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megapsft.checkpoint.convert.run import Result
from megapsft.checkpoint.convert.to_safetensors import ADAPTER
from megapsft.checkpoint.hf_folder import check_checkpoint
from megapsft.checkpoint.hf_save import READABLE, SOURCE
from megapsft.checkpoint.unfinished import Unfinished
from megapsft.checkpoint.weights import Weights, rows_of
from megapsft.checkpoint.weights.cast import Cast
from megapsft.checkpoint.weights.hf import read_json
from megapsft.checkpoint.weights.lora import CONFIG, TENSORS, Adapter, Merged
from megapsft.checkpoint.weights.part import Part
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.config import LoRAConfig
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig

BASE = "base"  # in state.json: the identity of what the adapters are beside
LOOK_BYTES = 4096  # of the beginning of each tensor, or one row of it


def identity(weights: Weights) -> str:
    """A hash of all names, shapes and dtypes, and of the first numbers of each tensor: not of all, which would take minutes."""
    digest = hashlib.sha256()
    for name, stored in sorted(weights.tensors.items()):
        digest.update(f"{name} {list(stored.shape)} {stored.dtype}\n".encode())
        rows = rows_of(weights, name, 0, min(stored.rows, max(1, LOOK_BYTES // max(1, stored.row_bytes))))
        digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_base(found: str, expected: str, model: Path, at: Path) -> None:
    """Refuse to go on with other weights than the adapters at `at` were trained beside."""
    if found != expected:
        rule = f"has other weights than those that the adapters of {at} were trained beside"
        raise Refused(str(model), rule, "name the folder that the run started from, as it was")


def adapter_config(lora: LoRAConfig, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json; `base` is the folder of the model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def keep_adapter_config(lora: LoRAConfig, base: Path, kept: Path) -> None:
    """Beside what a run keeps of its model: what an export of its adapters says of them."""
    (kept / ADAPTER).mkdir(parents=True, exist_ok=True)
    content = json.dumps(adapter_config(lora, str(base.absolute())), indent=2) + "\n"
    (kept / ADAPTER / CONFIG).write_text(content)


def adapter_of(stored: DistWeights, kept: Path) -> Adapter:
    """The adapters in a checkpoint of a run.

    Args:
        stored: their tensors.
        kept: what the run keeps of its model.

    Raises:
        Refused: no adapter_config.json.
    """
    return Adapter(stored.folder, read_json(kept / ADAPTER / CONFIG), stored)


def base_of(checkpoint: Path, state: dict[str, Any], kept: Path, hf: HFConfig, base: Path | None = None) -> Weights:
    """What the adapters in a checkpoint are beside.

    Args:
        state: of the checkpoint.
        kept: what the run keeps of its model.
        base: the folder of the model; None: where the run found it.

    Raises:
        Refused: it is not there any more, or has other weights by now.
    """
    folder = base or Path(read_json(kept / SOURCE)["path"])
    if not folder.is_dir():
        rule, remedy = f"is gone, and the checkpoint {checkpoint} has adapters only", "give --base, the folder where it is now"
        if base is not None:
            rule, remedy = "is not a folder", "name the one where the model is now"
        raise Refused(f"model folder {str(folder)!r}", rule, remedy)
    weights = check_checkpoint(folder, family_of(hf), hf).weights
    check_base(identity(weights), state[BASE], folder, checkpoint)
    return Part(weights, [name for rule in family_of(hf).parameters(hf) for name in rule.sources])


def merges_adapters(state: dict[str, Any]) -> bool:
    """Whether the checkpoint of this state.json has adapters alone, so that its weights are those of the base with them."""
    return BASE in state


def merged(base: Weights, adapter: Adapter, dtype: torch.dtype | None, hf: HFConfig) -> Weights:
    """The base as the run held it, in the dtype of its adapters, then in `dtype`, and the adapters merged into it.

    Args:
        dtype: of the weights; None: the run's.
    """
    held = next(iter(adapter.tensors.values())).dtype
    for wanted in (held, dtype or held):
        if any(stored.dtype != wanted for stored in base.tensors.values()):
            base = Cast(base, wanted)
    return Merged(base, adapter, hf.tie_word_embeddings)


def export_adapter(
    checkpoint: Path, state: dict[str, Any], kept: Path, hf: HFConfig, out: Path, base: Path | None = None
) -> Result:
    """The adapters in a checkpoint as a folder that PEFT reads. Memory: the adapters.

    Args:
        state: of the checkpoint.
        kept: what the run keeps of its model.
        base: the folder of the model that PEFT is to put beneath them; None: the one that the run started from.

    Raises:
        Refused: `out` is taken; `base` is another model; what `DistWeights` refuses.
    """
    adapter = adapter_of(DistWeights(checkpoint, hf, adapter=True), kept)
    config = dict(adapter.config)
    if base is not None:
        base_of(checkpoint, state, kept, hf, base)
        config["base_model_name_or_path"] = str(base.absolute())
    unfinished = Unfinished(out)
    unfinished.empty()
    try:
        content = {name: rows_of(adapter, name) for name in adapter.tensors}
        save_file(content, unfinished.folder / TENSORS, metadata={"format": "pt"})
        (unfinished.folder / TENSORS).chmod(READABLE)
        (unfinished.folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        unfinished.finish()
    except BaseException:
        unfinished.discard()
        raise
    nonfinite = {name: int((~tensor.isfinite()).sum()) for name, tensor in content.items()}
    nbytes = sum(stored.nbytes for stored in adapter.tensors.values())
    return Result(
        out=out,
        tensors=len(content),
        nbytes=nbytes,
        resumed=0,
        nonfinite={name: count for name, count in nonfinite.items() if count},
        warnings=_what_peft_refuses(config, hf),
    )


def _what_peft_refuses(config: dict[str, Any], hf: HFConfig) -> list[str]:
    found, base, modules = [], Path(config["base_model_name_or_path"]), set(config["target_modules"])
    if not any(base.glob("*.safetensors")):
        where = "is not a Hugging Face folder" if base.is_dir() else "is gone"
        found.append(f"PEFT puts the adapters on {base}, which {where}: name one with --base")
    if hf.num_experts and len(modules & {"gate_proj", "up_proj"}) == 1:
        why = "transformers 5 has gate_proj and up_proj of experts in one tensor, and PEFT 0.21 refuses adapters of one of them"
        found.append(f"{why}: export merged weights, without --adapter")
    return found
