"""The families that there are, by the exact architecture that config.json names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megapsft.errors import Refused
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.models.llama import Llama
from megapsft.models.parameters import Rule
from megapsft.models.parameters import parameter_count as count
from megapsft.models.qwen2 import Qwen2
from megapsft.models.qwen2_5_vl import Qwen25VL
from megapsft.models.qwen3 import Qwen3
from megapsft.models.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.architecture: family for family in (Qwen3(), Qwen3Moe(), Qwen2(), Llama(), Qwen25VL())}


def family_of(hf: HFConfig) -> Family:
    """The family whose architecture is exactly `hf.architecture`.

    Raises:
        Refused: there is none, listing those there are; a rope of three axes, which the family does not have.
    """
    if hf.architecture not in FAMILIES:
        raise _unknown(hf.architecture)
    family = FAMILIES[hf.architecture]
    if hf.rope.mrope_section is not None and not family.mrope:
        value = f"config.json: mrope_section={list(hf.rope.mrope_section)} of {hf.architecture}"
        raise Refused(value, "is of models that see images", "take it out, or mend architectures")
    return family


def check_known(raw: Mapping[str, Any]) -> None:
    """That a config.json names an architecture that there is, before anything else in it is understood or not.

    Raises:
        Refused: it does not; lists those there are.
    """
    for architecture in (raw.get("architectures") or ())[:1]:
        if architecture not in FAMILIES:
            raise _unknown(architecture)


def check_served(hf: HFConfig, engine: str) -> None:
    """That SGLang's servers can be given the weights of this model; `engine` is what asks for them, worded for the user.

    Raises:
        Refused: they cannot.
    """
    if not family_of(hf).served:
        rule = f"is not for {hf.architecture}: SGLang loads it with an image processor alone, which needs torchvision"
        raise Refused(engine, rule, "use the engine inprocess, which generates from text")


def parameter_count(hf: HFConfig) -> int:
    """Parameters of the model, the vocabulary unpadded; tied embeddings count once."""
    return count(family_of(hf).parameters(hf))


@lru_cache(maxsize=64)
def layer_rules(hf: HFConfig) -> tuple[Rule, ...]:
    """The rules of the first layer; all layers are alike."""
    rules = family_of(hf).parameters(dataclasses.replace(hf, num_hidden_layers=1))
    return tuple(rule for rule in rules if ".layers." in rule.name)


def _unknown(architecture: str) -> Refused:
    return Refused(f"config.json: architecture {architecture}", "is not supported", "use one of " + ", ".join(FAMILIES))
