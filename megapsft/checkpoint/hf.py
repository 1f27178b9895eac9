"""Hugging Face weights into the live Megatron model of all ranks, and out of it again, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapsft.checkpoint.hf_folder import check_checkpoint, check_keys, open_checkpoint, read_config
from megapsft.checkpoint.hf_save import save_hf
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import EMBEDDING, OUTPUT, canonical_name
from megapsft.models.parameters import Rule
from megapsft.policy.build import unwrap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def import_hf(chunks: Sequence[torch.nn.Module], model_dir: str | Path, hf: HFConfig) -> None:
    """Fill every parameter of the model from the folder; each rank reads only the parts that it holds. Collective.

    Args:
        chunks: this rank's GPTModels, wrapped or not; values are cast to each parameter's own dtype.
        hf: the config of `model_dir`.

    Raises:
        Refused: the folder is not readable or does not fit its config; the model has a parameter that the family does not
            know, or no rank has one that it does.
    """
    rules = family_of(hf).parameters(hf)
    checkpoint = check_checkpoint(model_dir, family_of(hf), hf)
    parameters = local_parameters(chunks, hf)
    _where(rules, parameters)  # every rule has its parameter on some rank
    by_name = {rule.name: rule for rule in rules}
    for name, parameter in parameters.items():
        # with tied embeddings and several pipeline stages the last one holds a copy
        rule = by_name[EMBEDDING if name == OUTPUT and hf.tie_word_embeddings else name]
        shard = rule.load(checkpoint.read, *_rank_and_size(rule), tuple(parameter.shape))
        if shard.shape != parameter.shape:
            sizes = f"{list(shard.shape)} from the checkpoint, {list(parameter.shape)} in the model"
            raise Refused(name, f"has two shapes: {sizes}", "build the model from the config.json of the same folder")
        parameter.copy_(shard)


@torch.no_grad()
def export_stream(chunks: Sequence[torch.nn.Module], hf: HFConfig) -> Iterator[tuple[str, Tensor | None]]:
    """Every Hugging Face tensor of the model, in the order of the family's rules. Collective: all ranks must exhaust it.

    Tensors are whole, on the CPU, in the parameters' dtype, and the consumer's own. Only global rank 0 gets them; the others
    get None beside the same names. Of each shard one owner sends it to rank 0, so that no rank holds more than its own
    parameters, and rank 0 beyond that no more than the shards of one parameter and what they make up.

    Raises:
        Refused: the model has a parameter that the family does not know, or no rank has one that it does.
    """
    rules = family_of(hf).parameters(hf)
    parameters = local_parameters(chunks, hf)
    device = next(iter(parameters.values())).device
    me = dist.get_rank()
    for rule, place in zip(rules, _where(rules, parameters), strict=True):
        if me == 0:
            shards = []
            for owner in place.owners:
                if owner == 0:
                    shards.append(parameters[rule.name].detach())
                else:
                    shards.append(torch.empty(place.shape, dtype=place.dtype, device=device))
                    dist.recv(shards[-1], src=owner)
            for name, tensor in rule.export(shards).items():
                yield name, tensor.cpu()
        else:
            if me in place.owners:
                dist.send(parameters[rule.name].detach().contiguous(), dst=0)
            yield from dict.fromkeys(rule.sources).items()


def local_parameters(chunks: Sequence[torch.nn.Module], hf: HFConfig) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank by their canonical names.

    Raises:
        Refused: one name twice, or one that the family has no rule for.
    """
    known = {rule.name for rule in family_of(hf).parameters(hf)} | {OUTPUT}
    expert_offset = 0
    if hf.num_experts:
        here = hf.num_experts // parallel_state.get_expert_model_parallel_world_size()
        expert_offset = here * parallel_state.get_expert_model_parallel_rank()
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        layer_offset = layers[0].layer_number - 1 if len(layers) else 0
        for local_name, parameter in model.named_parameters():
            name = canonical_name(local_name, layer_offset, expert_offset)
            if name not in known or name in found:
                rule = "is there twice" if name in found else f"is not a parameter of {hf.architecture}"
                raise Refused(f"parameter {name}", rule, "build the model with the family's own config and layer spec")
            found[name] = parameter
    return found


@dataclass(frozen=True)
class _Place:
    """Where the shards of one parameter are, and what one of them is like."""

    owners: list[int]  # global rank that hands out the shard, by tensor-parallel rank
    dtype: torch.dtype
    shape: list[int]


def _where(rules: Sequence[Rule], parameters: dict[str, torch.nn.Parameter]) -> list[_Place]:
    """The place of every rule's parameter, by one all-reduce: of the ranks that hold a shard the lowest owns it. Collective.

    Raises:
        Refused: no rank has a parameter for some rule, so that its weights would be lost in silence.
    """
    index = {rule.name: number for number, rule in enumerate(rules)}
    absent = torch.iinfo(torch.int64).max
    dense = parallel_state.get_tensor_model_parallel_world_size()
    expert = parallel_state.get_expert_tensor_parallel_world_size()
    ranks = max(dense, expert)
    device = next(iter(parameters.values())).device
    table = torch.full((len(rules), ranks + 3), absent, dtype=torch.int64)  # owners, dtype, rows, columns
    for name, parameter in parameters.items():
        if name in index:  # not so the copy of tied embeddings
            row = table[index[name]]
            row[_rank_and_size(rules[index[name]])[0]] = dist.get_rank()
            row[ranks] = DTYPES.index(parameter.dtype)
            row[ranks + 1 : ranks + 1 + parameter.dim()] = torch.tensor(parameter.shape)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MIN)
    places = []
    for rule, row in zip(rules, table.tolist(), strict=True):
        owners = row[: expert if rule.expert else dense]
        if absent in owners:
            remedy = "build the model with the family's own config and layer spec"
            raise Refused(f"parameter {rule.name}", "is not in the model, but in the checkpoint", remedy)
        places.append(_Place(owners, DTYPES[row[ranks]], [size for size in row[ranks + 1 :] if size != absent]))
    return places


def _rank_and_size(rule: Rule) -> tuple[int, int]:
    """This rank's place in the tensor-parallel group that splits the rule's parameter."""
    if rule.expert:
        return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


__all__ = ["check_checkpoint", "check_keys", "export_stream", "import_hf", "local_parameters", "open_checkpoint", "read_config",
           "save_hf"]  # fmt: skip
