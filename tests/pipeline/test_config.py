"""What a pipeline may be: refused at the door, before anything is written. Not here: what a done stage refuses (test_run.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from megapsft.cli import main
from megapsft.data.arithmetic import generate, preferences, write_jsonl
from megapsft.pipeline.config import load_pipeline, stage_config
from tests.shipped import FOLDER

SHIPPED = sorted((FOLDER / "pipelines").glob("*.yaml"))


def with_stage(tree: dict, number: int, **other: object) -> None:
    tree["stages"][number] = tree["stages"][number] | other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(modle="x"), "modle: is not a config key; did you mean 'model'? known keys here: run, model,"),
        (lambda tree: tree["stages"][0].update(sets={}), "stages.0.sets: is not a config key; did you mean 'set'? known keys"),
        (lambda tree: tree["compare"].update(temprature=1), "compare.temprature: is not a config key; did you mean"),
        (lambda tree: tree.update(stages=[]), "stages=[]: is not a list of stages"),
        (lambda tree: tree.update(model=""), "model='': names no model"),
        (lambda tree: tree.update(model="nowhere"), "nowhere"),
        (lambda tree: tree["run"].update(stop_after=60), "run.stop_after: is not a config key"),
        (lambda tree: tree["compare"].update(data=[]), "compare.data=[]: names no file, and compare has other keys"),
        (lambda tree: tree["compare"].update(data=["no.jsonl"]), "no.jsonl"),
        (lambda tree: tree["compare"].update(k=[1, 8]), "k=8: must lie in 1..4"),
        (lambda tree: tree["compare"].update(reward="math_anser"), "reward 'math_anser': is not known"),
        (lambda tree: with_stage(tree, 1, name="psft"), "stage 'psft': is there twice"),
        (lambda tree: with_stage(tree, 1, name="start"), "stage 'start': is called as something else"),
        (lambda tree: with_stage(tree, 1, name="../b"), "stage '../b': is no name of a folder"),
        (lambda tree: tree["stages"][1].pop("config"), "stages.1.config: is missing; add it"),
        (lambda tree: tree["stages"][1].update(confg="psft.yaml"), "stages.1.confg: is not a config key; did you mean"),
        (lambda tree: with_stage(tree, 1, config="no.yaml"), "no.yaml: is not a file"),
        (lambda tree: with_stage(tree, 1, set={"trian": {}}), "grpo.trian: is not a config key; did you mean 'train'?"),
        (lambda tree: with_stage(tree, 1, set={"run": {"dir": "x"}}), "grpo.run.dir: is what the pipeline decides"),
        (lambda tree: with_stage(tree, 1, set={"model": {"path": "x"}}), "grpo.model.path: is what the pipeline decides"),
        (lambda tree: with_stage(tree, 1, set={"data": {"path": "no.jsonl"}}), "stage grpo: data.path='no.jsonl': is not a file"),
        (lambda tree: tree["stages"][1]["set"].update(rewards=[]), "stage grpo: rewards=[]: names none"),
        (lambda tree: with_stage(tree, 0, set={"reference": {"path": {"stage": "grpo"}}}),
         "stage psft: {stage: grpo}: names no stage before psft; use one of start"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(change, said, pipeline, tmp_path, capsys):
    path = pipeline(tmp_path, "psft", "grpo")
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))
    assert main(["pipeline", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["pipeline.yaml"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grop.train.steps=1", "is of no stage, and of nothing else that a pipeline has; use psft.KEY, grpo.KEY, run, model"),
        ("stages=[]", "'stages=[]': is of no stage"),
        ("psft=1", "'psft=1': is of no stage"),
        ("psft.train.stpes=1", "psft.train.stpes: is not a config key; did you mean 'steps'?"),
        ("compare.m=1", "compare.m: is not a config key"),
    ],
)  # fmt: skip
def test_overrides_that_are_of_nothing_are_refused(override, said, pipeline, tmp_path, capsys):
    assert main(["pipeline", str(pipeline(tmp_path, "psft", "grpo")), override]) == 2
    assert said in capsys.readouterr().err


def test_as_one_of_several_ranks_it_is_refused(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pipeline", str(pipeline(tmp_path, "psft", "grpo"))]) == 2
    assert "starts the ranks of its stages itself" in capsys.readouterr().err


def test_overrides_go_to_their_stage_and_over_what_is_set(pipeline, tmp_path):
    path = pipeline(tmp_path, "psft", "grpo")
    overrides = ["grpo.objective.kl_coef=0.5", "grpo.objective.name=gspo", "grpo.reference.path={stage: start}", "run.dir=there"]
    loaded = load_pipeline(path, [*overrides, "psft.train.steps=7"])
    psft, grpo = (stage_config(loaded, number) for number in range(2))
    assert (psft.train.steps, grpo.train.steps) == (7, 4)
    assert (psft.objective["name"], grpo.objective) == ("psft", {"name": "gspo", "kl_coef": 0.5})
    assert (psft.run.dir, grpo.run.dir) == ("there/psft", "there/grpo")
    assert (grpo.model.path, grpo.reference.path) == ("there/psft/hf", loaded.model)


def test_a_dry_run_says_what_differs_and_writes_nothing(pipeline, tmp_path, capsys):
    path = pipeline(tmp_path, "psft", "grpo")
    assert main(["pipeline", str(path), "--dry-run", "grpo.train.steps=9"]) == 0
    printed = capsys.readouterr().out
    assert "-> psft -> grpo" in printed
    assert printed.count("yaml, to be trained") == 2
    assert f"model.path='{tmp_path}/run/psft/hf' (not 'models/arithmetic')" in printed
    assert "train.steps=9 (not 180)" in printed
    assert "compared: sums (12 problems x 4)" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["pipeline.yaml"]


@pytest.fixture(scope="module")
def place(model, tmp_path_factory) -> Path:
    """A folder with what the shipped pipelines name."""
    folder = tmp_path_factory.mktemp("place")
    problems = generate(400, 0, "easy")
    write_jsonl(folder / "arithmetic.jsonl", problems)
    write_jsonl(folder / "arithmetic-preferences.jsonl", preferences(problems, 0))
    write_jsonl(folder / "test.jsonl", generate(100, 1, "easy"))
    for name in ("tiny", "arithmetic"):
        shutil.copytree(model, folder / "models" / name)
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_pipelines_are_ready_to_run(path, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["pipeline", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"runs/{path.stem}: models/" in printed
    assert "compared: test (100 problems x 8)" in printed
    assert not (place / "runs").exists()


def test_there_is_a_pipeline_of_each_kind():
    assert {path.stem for path in SHIPPED} >= {"psft-grpo", "sft-grpo", "psft-dpo", "rl-then-sft", "rl-then-sft-kl"}
