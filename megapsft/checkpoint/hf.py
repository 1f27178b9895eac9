"""Hugging Face weights into the live Megatron model of all ranks, and out of it again, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.checkpoint.hf_folder import check_checkpoint, check_keys, open_checkpoint, read_config
from megapsft.checkpoint.hf_save import save_hf
from megapsft.checkpoint.weights.drawn import Drawn
from megapsft.checkpoint.weights.held_in_fp8 import assign
from megapsft.checkpoint.weights.live import live_weights, local_parameters, rank_and_size, whereabouts
from megapsft.config import LoRAConfig
from megapsft.errors import Refused
from megapsft.models.adapters import trained_rules
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import EMBEDDING, OUTPUT
from megapsft.models.parameters import Read, Rule


def import_hf(chunks: Sequence[torch.nn.Module], model_dir: str | Path, hf: HFConfig) -> None:
    """Fill every parameter of the model from the folder; each rank reads only the parts that it holds. Collective.

    Args:
        chunks: this rank's GPTModels, wrapped or not; values are cast to each parameter's own dtype.
        model_dir: a Hugging Face folder, or one that `megapsft convert hf-to-megatron` made.
        hf: the config of `model_dir`.

    Raises:
        Refused: the folder is not readable or does not fit its config; the model has a parameter that the family does not
            know, or no rank has one that it does.
    """
    fill(chunks, check_checkpoint(model_dir, family_of(hf), hf).read, hf)


@torch.no_grad()
def fill(chunks: Sequence[torch.nn.Module], read: Read, hf: HFConfig, rules: Sequence[Rule] | None = None) -> None:
    """As `import_hf`, from weights that are open and checked already.

    Args:
        read: gives parts of Hugging Face tensors.
        rules: of the adapters, which are filled instead of what they are beside; None: the family's.
    """
    rules = rules or family_of(hf).parameters(hf)
    parameters = local_parameters(chunks, hf, rules)
    whereabouts(rules, parameters)  # every rule has its parameter on some rank
    by_name = {rule.name: rule for rule in rules}
    for name, parameter in parameters.items():
        # with tied embeddings and several pipeline stages the last one holds a copy
        rule = by_name[EMBEDDING if name == OUTPUT and hf.tie_word_embeddings else name]
        shard = rule.load(read, *rank_and_size(rule), tuple(parameter.shape))
        if shard.shape != parameter.shape:
            sizes = f"{list(shard.shape)} from the checkpoint, {list(parameter.shape)} in the model"
            raise Refused(name, f"has two shapes: {sizes}", "build the model from the config.json of the same folder")
        assign(parameter, shard)


def init_adapters(chunks: Sequence[torch.nn.Module], hf: HFConfig, lora: LoRAConfig, seed: int) -> None:
    """Fill the adapters of the model, where it has some, as they are before the first step. Collective."""
    rules = trained_rules(hf, lora)
    if rules:
        fill(chunks, Drawn(rules, seed).read, hf, rules)


def export_stream(chunks: Sequence[torch.nn.Module], hf: HFConfig) -> Iterator[tuple[str, Tensor | None]]:
    """Every Hugging Face tensor of the model, in the order of the family's rules. Collective: all ranks must exhaust it.

    Adapters are merged. Tensors are whole, on the CPU, in the parameters' dtype, and the consumer's own. Only global rank 0 gets
    them; the others get None beside the same names. Memory: what `LiveWeights` says, of one tensor.

    Raises:
        Refused: what `LiveWeights` refuses.
    """
    weights = live_weights(chunks, hf)
    here = dist.get_rank() == 0
    for name, stored in weights.tensors.items():
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu" if here else "meta")
        weights.read(name, 0, stored.rows, tensor)
        yield name, tensor if here else None


__all__ = ["check_checkpoint", "check_keys", "export_stream", "import_hf", "local_parameters", "open_checkpoint", "read_config",
           "save_hf"]  # fmt: skip
