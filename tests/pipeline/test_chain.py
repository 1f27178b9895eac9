"""The jobs of a pipeline before they are submitted. No Slurm is needed; on one: tests/slurm/test_chain.py."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.errors import Refused
from megapsft.pipeline.chain import prepare_chain
from megapsft.pipeline.config import CompareConfig, load_pipeline
from tests.command import megapsft
from tests.shipped import FOLDER

NODES = ClusterConfig(gpus_per_node=0)


@pytest.fixture
def path(pipeline, tmp_path):
    return pipeline(tmp_path, "psft", "grpo")


@pytest.fixture
def config(path):
    return load_pipeline(path)


def test_each_job_is_after_the_one_before(config):
    chain = prepare_chain(config, NODES, nodes=1, after=("7",), options=("--nice",))
    assert [(name, script.after) for name, script in chain.scripts.items()] == [
        ("psft", ("7",)), ("grpo", ("number-of-psft",)), ("compare", ("number-of-grpo",)),
    ]  # fmt: skip
    for script in chain.scripts.values():
        text = script.render()
        assert "\n#SBATCH --nice\n" in text
        assert f"\n#SBATCH --dependency=afterok:{script.after[0]}\n#SBATCH --kill-on-invalid-dep=yes\n" in text
    for stage in ("psft", "grpo"):
        assert f"\nexport MEGAPSFT_EXPORT={config.export(stage).absolute()}\n" in chain.scripts[stage].render()
    assert chain.notes == []  # the stage whose model is not there yet is checked with the first one
    assert not chain.folder.exists()


def test_what_is_done_is_left_out(config):
    done = config.export("psft")
    shutil.copytree(config.model, done)
    (done / MANIFEST).touch()
    chain = prepare_chain(config, NODES, nodes=1, after=("7",))
    assert {name: script.after for name, script in chain.scripts.items()} == {"grpo": ("7",), "compare": ("number-of-grpo",)}
    shutil.copytree(done, config.export("grpo"))
    assert list(prepare_chain(config, NODES, nodes=1).scripts) == ["compare"]
    with pytest.raises(Refused, match="is done, and compare.data names no file"):
        prepare_chain(replace(config, compare=CompareConfig()), NODES, nodes=1)


@pytest.mark.parametrize(
    ("set_", "nodes", "rule"),
    [
        ("grpo.parallel.tensor_model_parallel_size=3", 3, "stage grpo: .*must divide"),
        ("psft.rollout.n=3", 1, "stage psft: rollout.n=3: is of sampled responses"),
        ("grpo.rollout.n=3", 0, "stage psft: --nodes 0: must be 1 or more"),
        ("run.dir=''", 1, "run.dir='': names no folder"),
    ],
)
def test_refused_before_anything_is_queued(path, set_, nodes, rule):
    with pytest.raises(Refused, match=rule):
        prepare_chain(load_pipeline(path, [set_]), NODES, nodes=nodes)


def test_what_is_not_on_this_machine_is_noted(path):
    chain = prepare_chain(load_pipeline(path, ["grpo.data.path=elsewhere.jsonl"]), NODES, nodes=1)
    assert chain.notes == ["stage grpo: elsewhere.jsonl is not on this machine: checked when the job starts"]


def test_a_dry_run_prints_the_scripts_and_writes_nothing(path, tmp_path):
    laptop = str(FOLDER / "cluster/laptop.yaml")
    done = megapsft("submit", str(path), "--cluster", laptop, "--dry-run", "cluster.time=1:00:00", "psft.train.steps=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash\n") == done.stdout.count("#SBATCH --time=1:00:00\n") == 3
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["psft", "grpo", "compare"]
    assert list(tmp_path.iterdir()) == [path]
