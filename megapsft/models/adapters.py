"""Where Megatron keeps a LoRA adapter beside its base: the rules of `parameters.py`, for the tensors of PEFT.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight

Names and splits are those of the canonical LoRA of Megatron-Bridge (megatron/bridge/peft), which keeps an adapter of its own for
each of q, k, v, gate and up. All of its matrices are split by rows, also A, whose output it gathers; only A of a layer whose
inputs are split is split by columns. Experts have adapters of their own, as in its `local_experts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megapsft.config import LoRAConfig
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import QKV, Block, GatedMLP, RowParallel, Rule, Shape
from megapsft.models.stored_names import Place, spellings, stored_at

PREFIX = "base_model.model."  # of all names of PEFT
A, B = ".lora_A.weight", ".lora_B.weight"
SHOWN = 5  # names in a message


@dataclass(frozen=True, kw_only=True)
class ColumnParallel(Rule):
    """Rows (outputs) split over the ranks."""

    def blocks(self) -> list[Block]:
        return [Block(0, self.shape[0], self.hf, 0)]


@dataclass(frozen=True)
class _Linear:
    """A linear layer that can have an adapter."""

    module: str  # Hugging Face's, such as model.layers.0.self_attn.q_proj
    at: str  # Megatron's name of its adapter
    shape: Shape  # [outputs, inputs]
    inputs_split: bool
    expert: bool

    def names(self) -> tuple[str, str]:
        """Megatron's names of A and B."""
        return f"{self.at}.linear_in.weight", f"{self.at}.linear_out.weight"

    def rules(self, rank: int) -> tuple[Rule, Rule]:
        (a, b), hf = self.names(), PREFIX + self.module
        outputs, inputs = self.shape
        down = RowParallel if self.inputs_split else ColumnParallel
        return (
            down(name=a, hf=hf + A, shape=(rank, inputs), expert=self.expert),
            ColumnParallel(name=b, hf=hf + B, shape=(outputs, rank), expert=self.expert),
        )


def adapter_rules(hf: HFConfig, ranks: Mapping[str, int]) -> tuple[Rule, ...]:
    """One rule for each matrix of an adapter, in the order of the base.

    Args:
        ranks: of the adapter of each linear layer, by module such as model.layers.0.self_attn.q_proj.

    Raises:
        Refused: modules that are not linear layers of attention, of an MLP or of an expert of this model.
    """
    linear = {layer.module: layer for layer in _linear_layers(hf)}
    unknown = sorted(set(ranks) - set(linear))
    if unknown:
        rule = f"has adapters for {', '.join(unknown[:SHOWN])}, which are not projections of {hf.architecture}"
        raise Refused("adapter", rule, "merge the adapter")
    return tuple(rule for module, layer in linear.items() if module in ranks for rule in layer.rules(ranks[module]))


def trained_rules(hf: HFConfig, lora: LoRAConfig) -> tuple[Rule, ...]:
    """The rules of the adapters that `lora` trains: the same rank in every layer and every expert; () where there are none."""
    if lora.rank is None:
        return ()
    modules = (layer.module for layer in _linear_layers(hf))
    return adapter_rules(hf, {name: lora.rank for name in modules if name.rpartition(".")[2] in lora.target_modules})


def adapter_places(rules: Sequence[Rule], hf: HFConfig) -> dict[str, Place]:
    """Where a torch_dist checkpoint keeps the parameters of `adapter_rules`, by name.

    As for the base, one tensor has a matrix of all layers, or of all experts of all layers. Where some of them have no adapter,
    or one of another rank, that tensor would have holes: they are kept as tensors of their own then, spelt with their numbers.
    """
    together: dict[str, list[Rule]] = {}
    for rule in rules:
        together.setdefault(stored_at(rule.name, hf).key, []).append(rule)
    places = {}
    for group in together.values():
        first = stored_at(group[0].name, hf)
        count = 1
        for size in first.leading:
            count *= size
        whole = len(group) == count and len({rule.whole for rule in group}) == 1
        for rule in group:
            places[rule.name] = stored_at(rule.name, hf) if whole else list(spellings(rule.name, hf))[-1]
    return places


def stored_ranks(shapes: Mapping[str, Shape], hf: HFConfig) -> dict[str, int]:
    """Ranks as of `adapter_rules`, of the adapter in a checkpoint whose tensors have these shapes; {} if it has none."""
    if not any(is_adapter(key) for key in shapes):
        return {}
    ranks = {}
    for layer in _linear_layers(hf):
        for place in spellings(layer.names()[0], hf):
            if place.key in shapes:
                ranks[layer.module] = shapes[place.key][len(place.leading)]
                break
    return ranks


def is_adapter(key: str) -> bool:
    """Whether a key of a checkpoint is of an adapter."""
    return ".adapter." in key


def _linear_layers(hf: HFConfig) -> Iterator[_Linear]:
    for rule in family_of(hf).parameters(hf):
        if not isinstance(rule, QKV | GatedMLP | RowParallel) or len(rule.shape) != 2:
            continue
        parts = {QKV: ("q", "k", "v"), GatedMLP: ("gate", "up")}.get(type(rule), ("",))
        for part, (name, shape) in zip(parts, rule.sources.items(), strict=True):
            at = rule.name.removesuffix(".weight") + ".adapter" + (f".adapter_{part}" if part else "")
            yield _Linear(name.removesuffix(".weight"), at, shape, isinstance(rule, RowParallel), rule.expert)
