"""The command `python -m tests.oracles` on the vectors beside it, and on vectors that must not pass."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.oracles.__main__ import EVALUATORS, main

VECTORS = Path(__file__).parents[1] / "oracles" / "vectors.json"
CASES = json.loads(VECTORS.read_text())["cases"]


def write(path, cases):
    path.write_text(json.dumps({"cases": cases}))
    return str(path)


def case(objective, name):
    (found,) = (copy.deepcopy(c) for c in CASES if (c["objective"], c["name"]) == (objective, name))
    return found


def verdict(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_every_vector_passes(capsys):
    assert main([str(VECTORS)]) == 0
    assert verdict(capsys).startswith(f"PASS {len(CASES)} of {len(CASES)} cases, largest deviation ")


@pytest.mark.parametrize("objective", sorted(EVALUATORS))
def test_one_objective_alone(capsys, objective):
    count = sum(c["objective"] == objective for c in CASES)
    assert main([str(VECTORS), "--objective", objective]) == 0
    assert verdict(capsys).startswith(f"PASS {count} of {count} cases")


def perturb_loss(c):
    c["outputs"]["loss"] *= 1 + 1e-8


def perturb_gradient(c):
    c["outputs"]["grad_logprobs"][0][1] *= 1 + 1e-8


def perturb_zero_gradient(c):
    c["outputs"]["grad_logprobs"][1][3] = 1e-8


def perturb_metric(c):
    c["outputs"]["metrics"]["ratio_min"] += 1e-8


def perturb_positions(c):
    c["outputs"]["metrics"]["clipped_positions"].pop()


def ask_for_more(c):
    c["outputs"]["metrics"]["advantage_mean"] = 1.0


def ask_for_unknown_option(c):
    c["hparams"]["clip_middle"] = 0.1


def drop_an_input(c):
    del c["inputs"]["old_logprobs"]


@pytest.mark.parametrize(
    "spoil",
    [
        perturb_loss,
        perturb_gradient,
        perturb_zero_gradient,
        perturb_metric,
        perturb_positions,
        ask_for_more,
        ask_for_unknown_option,
        drop_an_input,
    ],
)
def test_a_spoilt_vector_fails(capsys, tmp_path, spoil):
    good, spoilt = case("psft", "high_0.28"), case("psft", "high_0.28")
    spoil(spoilt)
    assert main([write(tmp_path / "good.json", [good])]) == 0
    assert main([write(tmp_path / "spoilt.json", [good, spoilt])]) == 1
    assert verdict(capsys).startswith("FAIL 1 of 2 cases")


def test_a_spoilt_schedule_fails(capsys, tmp_path):
    spoilt = case("psft", "schedule_8_over_2")
    spoilt["outputs"]["log"][6]["clipfrac"] = 0.0
    assert main([write(tmp_path / "spoilt.json", [spoilt])]) == 1
    assert "log[6].clipfrac" in verdict(capsys)


def test_a_spoilt_aggregation_fails(tmp_path):
    spoilt = case("aggregation", "basic")
    spoilt["outputs"]["sum-over-Lmax"] += 1e-8
    assert main([write(tmp_path / "spoilt.json", [spoilt])]) == 1


def test_only_single_precision_agreement_is_not_enough(tmp_path):
    rounded = case("sft", "token_mean")
    rounded["outputs"]["grad_logprobs"] = torch.tensor(rounded["outputs"]["grad_logprobs"]).tolist()
    assert main([write(tmp_path / "rounded.json", [rounded])]) == 1


def test_unknown_objective_lists_the_known(capsys):
    assert main([str(VECTORS), "--objective", "pstf"]) == 1
    assert ", ".join(sorted(EVALUATORS)) in verdict(capsys)


def test_no_case_is_no_pass(capsys, tmp_path):
    assert main([write(tmp_path / "other.json", [{"objective": "unheard_of", "name": "one"}])]) == 1
    assert verdict(capsys).startswith("FAIL no case")
    assert main([write(tmp_path / "empty.json", [])]) == 1
    assert main([write(tmp_path / "sft.json", [case("sft", "token_mean")]), "--objective", "psft"]) == 1


def test_names_what_it_cannot_evaluate_and_goes_on(capsys, tmp_path):
    cases = [case("sft", "token_mean"), {"objective": "unheard_of", "name": "one"}]
    assert main([write(tmp_path / "mixed.json", cases)]) == 0
    assert "not yet supported: unheard_of (1 cases)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"case": []}', '{"cases": [{"name": "no objective"}]}'])
def test_another_format_is_refused(capsys, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    assert main([str(tmp_path / "other.json")]) == 1
    assert "is not a file of vectors" in verdict(capsys)
