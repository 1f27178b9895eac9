"""Objectives by name. Not here: what the objectives compute."""

import pytest

from megapsft.errors import Refused
from megapsft.objectives.psft import PSFT
from megapsft.objectives.registry import build_objective, objective_names
from megapsft.objectives.sft import SFT


def test_the_files_are_the_list():
    assert {"psft", "sft"} <= set(objective_names())
    assert "registry" not in objective_names()


def test_builds_with_defaults_and_with_options():
    assert build_objective({"name": "sft"}) == SFT()
    assert build_objective({"name": "psft", "clip_high": None}) == PSFT(clip_high=None)
    assert build_objective({"name": "psft", "clip_high": "2e-1"}) == PSFT(clip_high=0.2)  # YAML 1.1 reads 2e-1 as a string


def test_leaves_the_config_as_it_is():
    options = {"name": "psft", "clip_high": 0.2}
    build_objective(options)
    assert options == {"name": "psft", "clip_high": 0.2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "psft, sft"),
        ({"name": "pstf"}, "did you mean 'psft'"),
        ({"name": "registry"}, "psft, sft"),
        ({"name": "_per_token"}, "psft, sft"),
        ({"name": ["psft"]}, "psft, sft"),
        ({"name": "psft", "clip_hgih": 0.2}, "did you mean 'clip_high'"),
        ({"name": "sft", "clip_high": 0.2}, "aggregation, max_response_length"),
        ({"name": "psft", "clip_high": "much"}, "objective.clip_high='much'"),
        ({"name": "psft", "clip_high": float("nan")}, "finite"),
        ({"name": "psft", "clip_high": -0.1}, "0 or more"),
        ({"name": "psft", "freeze_below": 1.1}, "0..1"),
        ({"name": "psft", "entropy_denominator": "selected"}, "entropy_threshold"),
        (
            {"name": "psft", "entropy_threshold": 0.3, "entropy_denominator": "selected", "aggregation": "seq-mean-token-sum"},
            "token-mean",
        ),
        ({"name": "sft", "aggregation": "mean"}, "seq-mean-token-mean"),
        ({"name": "sft", "aggregation": "sum-over-Lmax"}, "max_response_length"),
        ({"name": "sft", "aggregation": "sum-over-B-Lmax", "max_response_length": 0}, "1 or more"),
        ({"name": "sft", "max_response_length": 8}, "does not use it"),
    ],
)
def test_refuses_and_says_what_would_be_right(options, said):
    with pytest.raises(Refused, match=r"(?s).") as refused:
        build_objective(options)
    assert said in str(refused.value)


@pytest.mark.parametrize("wrong", [{"aggregation": "mean"}, {"entropy_denominator": "some"}, {"clip_high": float("nan")}])
def test_built_without_the_config_they_refuse_as_well(wrong):
    with pytest.raises(Refused):
        PSFT(**wrong)
