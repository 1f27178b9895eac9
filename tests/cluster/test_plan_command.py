"""`megapsft plan` as a user sees it: what is printed, what is written, and the exit code."""

from __future__ import annotations

import json

import pytest

from megapsft import cli
from tests.shipped import FOLDER

DENSE, MOE = str(FOLDER / "psft/qwen2.5-7b-instruct.yaml"), str(FOLDER / "psft/qwen3-30b-a3b.yaml")


@pytest.fixture
def say(monkeypatch, capsys):
    """Exit code, standard output and error of `megapsft plan`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *arguments])
        return code, *capsys.readouterr()

    return run


def test_what_fits(say, tmp_path):
    code, out, _ = say(MOE, "--nodes", "4", "--json", str(tmp_path / "plan.json"))
    assert code == 0
    for text in ("30.53 B parameters", "ep=8", "optimizer", "old policy", "experts", "fits: ", "tokens/s", "bubble", "assumed: "):
        assert text in out, text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["nodes"], plan["fits"], len(plan["stages"]), len(plan["proposals"])) == (4, True, 1, 5)
    assert plan["peak_bytes"] < plan["usable_bytes"]
    assert plan["tokens_per_second"] == pytest.approx(plan["tokens_per_step"] / plan["seconds_per_step"]["total"])
    assert plan["seconds_per_step"]["total"] == pytest.approx(sum(plan["seconds_per_step"].values()) / 2)


def test_what_does_not_fit_is_said_with_what_would(say):
    code, out, _ = say(MOE, "--nodes", "1")
    assert code == 2
    assert "does not fit: " in out
    assert "most of it optimizer" in out
    assert "the first of them: parallel.pipeline_model_parallel_size=4" in out


def test_what_no_split_makes_fit(say):
    small = MOE, "--gpus-per-node", "2", "parallel.expert_model_parallel_size=2"
    assert "no split of these GPUs fits" in say(*small)[1]
    assert "no split" not in say(*small, "--proposals", "0")[1]


def test_a_split_that_cannot_be_is_refused_beside_those_that_can(say):
    code, out, err = say(DENSE, "parallel.pipeline_model_parallel_size=3")
    assert code == 2
    assert "pipeline_model_parallel_size=3: must divide num_layers=28; use 1, 2, 4, 7, 14, 28" in err
    assert "the first of them: parallel." in out


def test_a_long_pipeline_is_shown_by_its_ends(say):
    _, out, _ = say(DENSE, "--nodes", "4", "parallel.pipeline_model_parallel_size=14", "parallel.tensor_model_parallel_size=1",
                    "parallel.sequence_parallel=false", "--gpus-per-node", "7", "data.pack_length=10240")  # fmt: skip
    assert [f"stage {stage}" in out for stage in (0, 1, 6, 13)] == [True, True, False, True]
    assert "pipeline" in out


def test_what_is_counted_of_fp8_is_said(say):
    said = "weights of layers in FP8 take 2 bytes a number, "
    assert said not in say(DENSE)[1]
    assert said + "beside those of bfloat16" in say(DENSE, "fp8.format=hybrid")[1]
    out = say(DENSE, "fp8.format=hybrid", "fp8.param_gather=true")[1]
    assert said + "in the place of bfloat16's; activations and traffic are bfloat16's" in out


def test_options_that_there_are_not(say):
    assert "--gpu v100: is not in the table" in say(DENSE, "--gpu", "v100")[2]
    assert "--proposals -1: must be 0 or more" in say(DENSE, "--proposals", "-1")[2]
