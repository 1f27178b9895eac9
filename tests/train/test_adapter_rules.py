"""What adapters are refused with, where something else would refuse it first without a GPU. Others: tests/test_errors.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.objectives.registry import build_objective
from megapsft.parallel import plan_mesh
from megapsft.policy.build import model_shape
from megapsft.train.plan import check_adapters

MODELS = Path(__file__).resolve().parents[2] / "configs/models"
TEXT, SEES = "Qwen2.5-7B-Instruct", "Qwen2.5-VL-7B-Instruct"
FP8 = "fp8.format=hybrid"


def check(model: str, *overrides: str) -> None:
    config = load_config(None, ["lora.rank=8", *overrides])
    hf = HFConfig.parse(json.loads((MODELS / model / "config.json").read_text()))
    mesh = plan_mesh(config.parallel, 1, model_shape(hf), on_cuda=False)
    check_adapters(config, mesh, hf, build_objective(config.objective))


def test_adapters_of_a_model_of_text_are_taken_in_fp8_too():
    check(TEXT)
    check(TEXT, FP8, "fp8.recipe=tensorwise")


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        (SEES, [], "lora.rank=8: is not for Qwen2_5_VLForConditionalGeneration"),
        (TEXT, [FP8, "fp8.param_gather=true"], "fp8.param_gather=true: holds the weights that are trained in FP8"),
        (TEXT, [FP8, "fp8.recipe=delayed"], "fp8.recipe=delayed: has scales of earlier passes"),
    ],
)
def test_what_they_are_refused_with(model, overrides, said):
    with pytest.raises(Refused, match=said):
        check(model, *overrides)
