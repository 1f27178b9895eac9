"""The families that there are, by the exact architecture that config.json names."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from megapsft.errors import Refused
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.models.llama import Llama
from megapsft.models.parameters import Rule
from megapsft.models.parameters import parameter_count as count
from megapsft.models.qwen2 import Qwen2
from megapsft.models.qwen3 import Qwen3
from megapsft.models.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.architecture: family for family in (Qwen3(), Qwen3Moe(), Qwen2(), Llama())}


def family_of(hf: HFConfig) -> Family:
    """The family whose architecture is exactly `hf.architecture`.

    Raises:
        Refused: there is none; lists those there are.
    """
    if hf.architecture not in FAMILIES:
        raise Refused(f"config.json: architecture {hf.architecture}", "is not supported", "use one of " + ", ".join(FAMILIES))
    return FAMILIES[hf.architecture]


def parameter_count(hf: HFConfig) -> int:
    """Parameters of the model, the vocabulary unpadded; tied embeddings count once."""
    return count(family_of(hf).parameters(hf))


@lru_cache(maxsize=64)
def layer_rules(hf: HFConfig) -> tuple[Rule, ...]:
    """The rules of the first layer; all layers are alike."""
    rules = family_of(hf).parameters(dataclasses.replace(hf, num_hidden_layers=1))
    return tuple(rule for rule in rules if ".layers." in rule.name)
