"""Pipelines from beginning to end: what they leave, killed and continued, interrupted, and what their table says.

Not here: several ranks in a stage (tests/e2e), SGLang in a stage (tests/e2e/test_rl_sglang.py), and that a pipeline is better
than another.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megapsft.cli import main
from tests.command import ROOT, megapsft
from tests.metrics.pages import events, texts


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> tuple[Path, str]:
    """The config of PSFT then GRPO, run without a disturbance, and what that printed."""
    path = pipeline(tmp_path_factory.mktemp("whole"), "psft", "grpo")
    tree = yaml.safe_load(path.read_text())
    first = tree["stages"][0]["set"]
    first["log"] = first["log"] | {"tensorboard": True}  # not the mapping that the stages share
    path.write_text(yaml.safe_dump(tree))
    done = megapsft("pipeline", str(path))
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def begin(path: Path) -> subprocess.Popen:
    """The pipeline as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "megapsft.cli", "pipeline", str(path)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        if process.poll() is not None:
            pytest.fail("".join(process.communicate()))
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


def children(process: subprocess.Popen) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def rows(path: Path) -> list[dict]:
    return json.loads((path.parent / "run/hand-off.json").read_text())


def test_each_stage_starts_from_the_model_of_the_one_before(whole, model):
    run = whole[0].parent / "run"
    starts = {name: yaml.safe_load((run / name / "config.yaml").read_text())["model"]["path"] for name in ("psft", "grpo")}
    assert starts == {"psft": str(model), "grpo": str(run / "psft/hf")}
    for name, steps in {"psft": 2, "grpo": 4}.items():
        assert len((run / name / "steps.jsonl").read_text().splitlines()) == steps
        assert (run / name / "hf/conversion.json").is_file()


def test_the_table_has_what_the_evaluations_say(whole):
    path, printed = whole
    assert [(row["stage"], row["benchmark"], row["n"]) for row in rows(path)] == [
        ("start", "sums", 4), ("psft", "sums", 4), ("grpo", "sums", 4),
    ]  # fmt: skip
    for row in rows(path):
        found = json.loads((path.parent / "run" / row["stage"] / "evaluate/results.json").read_text())
        assert {f"evaluate/sums/{key}": row[key] for key in ("avg", "avg_se", "pass@4", "pass@4_se", "length")}.items() <= (
            found["metrics"].items()
        )
        assert row["tokens"] == sum(map(sum, found["benchmarks"]["sums"]["lengths"]))
        assert f"{100 * row['avg']:.2f} ± {100 * row['avg_se']:.2f}" in printed
        assert f"{row['entropy']:.4f}" in printed
    markdown = (path.parent / "run/hand-off.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in markdown] == ["| stage", "| ---", "| start", "| psft", "| grpo"]
    assert (path.parent / "run/hand-off.png").read_bytes().startswith(b"\x89PNG")


def test_the_tracker_of_a_stage_shows_the_table_so_far(whole):
    run = whole[0].parent / "run"
    (update, table), *others = texts(run / "psft/tensorboard", "tables/hand-off")
    assert not others
    assert table.splitlines() == (run / "hand-off.md").read_text().splitlines()[:4]  # without grpo, which came later
    (picture,) = events(run / "psft/tensorboard").Images("pictures/hand-off")
    assert picture.step == update == len((run / "psft/metrics.jsonl").read_text().splitlines())
    assert not (run / "grpo/tensorboard").exists()


def test_entropy_and_kl_are_those_of_transformers(whole, model):
    path, _ = whole
    run = path.parent / "run"
    found = {row["stage"]: row for row in rows(path)}
    assert (found["start"]["kl_k1"], found["start"]["kl_k3"]) == (0, 0)
    for name in ("psft", "grpo"):
        answers = [json.loads(line) for line in (run / name / "evaluate/sums.jsonl").read_text().splitlines()]
        own, entropy = of_transformers(run / name / "hf", answers)
        before, _ = of_transformers(model, answers)
        gap = before - own
        assert found[name]["tokens"] == len(own)
        assert found[name]["entropy"] == pytest.approx(float(entropy.mean()), abs=1e-4)
        assert found[name]["kl_k1"] == pytest.approx(float(-gap.mean()), abs=1e-4)
        assert found[name]["kl_k3"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), abs=1e-4)
        assert found[name]["kl_k3"] > 1e-3  # so that the agreement says something


@torch.no_grad()
def of_transformers(folder: Path, answers: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [tokens] of all response tokens, one response after the other, without packing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs, entropy = [], []
    for answer in answers:
        prompt, response = answer["prompt_token_ids"], answer["rollouts"][0]["token_ids"]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        log_p = logits.log_softmax(-1)
        logprobs.append(log_p.gather(-1, torch.tensor(response)[:, None])[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropy)


def test_killed_in_the_second_stage_it_goes_on_from_there(whole, pipeline, tmp_path):
    path = pipeline(tmp_path, "psft", "grpo")
    run = tmp_path / "run"
    process = begin(path)
    wait_for(process, (run / "grpo/checkpoints/step-00000001").exists)
    (stage,) = children(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while not is_gone(stage):
        assert time.monotonic() < deadline, "the stage outlives the pipeline"
        time.sleep(0.01)
    assert not (run / "grpo/hf").exists(), "it was done before it could be killed"
    first = {file: file.read_bytes() for file in (run / "psft").rglob("*.jsonl")}

    again = megapsft("pipeline", str(path))
    assert again.returncode == 0, again.stderr
    assert "psft: " in again.stdout
    assert "yaml, done" in again.stdout
    assert "yaml, to be continued" in again.stdout
    assert "continues" in again.stdout
    assert f"{run}/psft: 2 steps" not in again.stdout
    assert {file: file.read_bytes() for file in (run / "psft").rglob("*.jsonl")} == first
    for kind in ("json", "md"):
        assert (run / f"hand-off.{kind}").read_text() == (whole[0].parent / f"run/hand-off.{kind}").read_text()


def test_what_is_done_is_not_done_again(whole, capfd):
    path, _ = whole
    run = path.parent / "run"
    written = [file for name in ("start", "psft", "grpo") for file in (run / name).rglob("*.json*")]
    before = {file: file.stat().st_mtime_ns for file in written if file.name != "results.json"}  # which is of what is there
    assert main(["pipeline", str(path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    printed = capfd.readouterr().out
    assert printed.count("yaml, done") == 2
    assert f"{100 * rows(path)[-1]['avg']:.2f} ±" in printed
    assert printed.count("KL (k1)") == 1
    assert "updates" not in printed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("psft.train.seed=5", "stage psft: train.seed=5: differs from the 1234 that"),
        ("grpo.optimizer.lr=1e-5", "stage grpo: optimizer.lr=1e-05: differs from the 0.0003 that"),
        ("psft.train.steps=3", "stage psft: train.steps=3: makes 3 steps, and the stage is done with 2"),
        ("model=run/psft/hf", "stage psft: model.path=run/psft/hf: differs from the"),
        ("compare.n=8", "n=8: differs from the 4 that"),
    ],
)
def test_another_config_for_what_is_done_is_refused(override, said, whole, monkeypatch, capsys):
    path, _ = whole
    monkeypatch.chdir(path.parent)
    before = rows(path)
    assert main(["pipeline", str(path), override]) == 2
    assert said in capsys.readouterr().err
    assert rows(path) == before


def test_other_weights_than_a_stage_was_started_from_are_refused(whole, capsys):
    path, _ = whole
    file = path.parent / "run/grpo/started-from.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"weights": "0" * 32}))
    try:
        assert main(["pipeline", str(path)]) == 2
    finally:
        file.write_text(before)
    assert "stage grpo: was started from other weights than" in capsys.readouterr().err


def test_sft_then_dpo_on_two_ranks_with_the_reference_that_is_named(pipeline, tmp_path):
    path = pipeline(tmp_path, "sft", "dpo")
    done = megapsft("pipeline", str(path), "dpo.parallel.tensor_model_parallel_size=2", "compare.limit=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = yaml.safe_load((run / "dpo/config.yaml").read_text())
    assert (config["objective"]["name"], config["reference"]["path"]) == ("dpo", str(run / "sft/hf"))
    assert "2 process(es): tp=2" in done.stdout
    assert [row["stage"] for row in rows(path)] == ["start", "sft", "dpo"]
    files = ["dpo", "dpo.yaml", "hand-off.json", "hand-off.md", "hand-off.png", "sft", "sft.yaml", "start"]
    assert sorted(path.name for path in run.iterdir()) == files


def test_a_stage_that_fails_ends_the_pipeline_with_its_exit_code(pipeline, tmp_path):
    path = pipeline(tmp_path, "sft", "dpo", compare={})
    (tmp_path / "run/sft").mkdir(parents=True)
    with (tmp_path / "run/sft/.lock").open("a+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        done = megapsft("pipeline", str(path))
    assert done.returncode == 2
    refused, ended = done.stderr.splitlines()
    assert "is being trained by another process" in refused
    assert ended == (
        "megapsft: stage sft ended with exit code 2; mend what it says above, then the same command goes on from its last "
        f"checkpoint in {tmp_path}/run/sft"
    )
    assert "compared: nothing" in done.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["sft", "sft.yaml"]


def test_interrupted_it_ends_with_its_stage(pipeline, stages, tmp_path):
    endless = stages["sft"] | {"set": stages["sft"]["set"] | {"train": {"steps": 100000, "batch_size": 8, "minibatch_size": 8}}}
    path = pipeline(tmp_path, compare={}, stages=[endless])
    process = begin(path)
    wait_for(process, (tmp_path / "run/sft/checkpoints/latest").exists)
    (stage,) = children(process)
    process.send_signal(signal.SIGINT)  # to the pipeline alone, not to its group
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert is_gone(stage)
    assert said.splitlines()[-1] == (
        f"megapsft: stage sft was interrupted; the same command goes on from its last checkpoint in {tmp_path}/run/sft"
    )
