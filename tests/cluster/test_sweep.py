"""The points of a sweep and its folder. Not here: what runs measured (test_sweep_report.py), jobs (tests/slurm/test_sweep.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megapsft import cli
from megapsft.cluster.sweep.points import Asked, parse_vary, points
from megapsft.cluster.sweep.sweep import check_folder, held, write
from megapsft.config import load_config
from megapsft.errors import Refused
from tests.shipped import FOLDER

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
MOE = FOLDER / "psft/qwen3-30b-a3b.yaml"


@pytest.fixture
def config(tiny_models, tiny_data, tmp_path) -> Path:
    """4 layers, 4 heads; 16 rows a step, 8 an update."""
    tree = {
        "model": {"path": str(tiny_models("qwen3")), "dtype": "float32"},
        "data": {"path": str(tiny_data), "columns": {"prompt": "question", "demonstration": "answer"}, "pack_length": 512},
        "train": {"batch_size": 16, "minibatch_size": 8, "sft_warmup_steps": 3},
        "checkpoint": {"interval": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def asked(config: Path, **changed) -> Asked:
    """Over 1 and 2 nodes of one rank each, where nothing else is said."""
    told = {"nodes": (1, 2), "vary": {}, "steps": 5, "ranks_per_node": 1} | changed
    return Asked(config=str(config), **told)


def test_values_that_are_varied():
    assert parse_vary([f"{TP}=1,2", "parallel.recompute_granularity=null,full", "optimizer.lr=1e-6"]) == {
        TP: (1, 2), "parallel.recompute_granularity": (None, "full"), "optimizer.lr": ("1e-6",),
    }  # fmt: skip
    assert parse_vary(["parallel.recompute_modules=[mlp],[mlp, core_attn]"]) == {
        "parallel.recompute_modules": (["mlp"], ["mlp", "core_attn"])
    }


@pytest.mark.parametrize("text", [TP, f"{TP}=", "=1,2", "a..b=1", f"{TP}=[1"])
def test_values_that_are_none(text):
    with pytest.raises(Refused, match="names no values of a key"):
        parse_vary([text])


def test_a_point_for_each_number_of_nodes_and_each_value(config, tmp_path):
    found = points(asked(config, nodes=(4, 1), ranks_per_node=2, vary={TP: (1, 2), PP: (1, 2)}), tmp_path / "sweep")
    assert [(point.name, point.ranks, point.split) for point in found][:5] == [
        ("nodes-1_tp-1_pp-1", 2, "tp=1 pp=1"),
        ("nodes-1_tp-1_pp-2", 2, "tp=1 pp=2"),
        ("nodes-1_tp-2_pp-1", 2, "tp=2 pp=1"),
        ("nodes-1_tp-2_pp-2", 2, "tp=2 pp=2"),
        ("nodes-4_tp-1_pp-1", 8, "tp=1 pp=1"),
    ]
    assert len(found) == 8
    for point in found:
        assert point.config.run.dir == str(tmp_path / "sweep" / point.name)
        assert point.config.parallel.tensor_model_parallel_size == point.varied[TP]
    assert [point.name for point in found if point.refused] == ["nodes-1_tp-2_pp-2"]  # 4 ranks, and there are 2


def test_a_point_measures_steps_and_nothing_beside_them(config, tmp_path):
    (point,) = points(asked(config, nodes=(1,)), tmp_path)
    assert (point.config.train.steps, point.config.train.sft_warmup_steps, point.config.checkpoint.interval) == (5, 0, 0)
    (point,) = points(asked(config, nodes=(1,), overrides=("checkpoint.interval=3", "train.seed=7")), tmp_path)
    assert (point.config.checkpoint.interval, point.config.train.seed) == (3, 7)


def test_strong_scaling_keeps_the_batch_and_weak_scaling_lets_it_grow(config, tmp_path):
    for scaling, sizes in {"strong": [(16, 8)] * 3, "weak": [(16, 8), (24, 12), (32, 16)]}.items():
        found = points(asked(config, nodes=(2, 3, 4), scaling=scaling), tmp_path)
        assert [(point.config.train.batch_size, point.config.train.minibatch_size) for point in found] == sizes
    (_, odd) = points(asked(config, nodes=(2, 3), scaling="weak", overrides=("train.minibatch_size=1",)), tmp_path)
    assert odd.refused == "train.minibatch_size=1: of 2 nodes is not a whole number of rows on 3"
    (point, _) = points(asked(config, scaling="weak", overrides=("train.minibatch_size=null",)), tmp_path)
    assert point.config.train.minibatch_size is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"vary": {TP: (3,)}}, "tensor_model_parallel_size=3: must divide num_attention_heads=4"),
        ({"vary": {PP: (4,)}}, "world size 2: must be a multiple of tensor 1 x pipeline 4"),
        ({"ranks_per_node": 8}, "world size 16: has 16 data-parallel ranks for the 8 samples"),
        ({"overrides": ("train.minibatch_size=5",)}, "train.minibatch_size=5: must divide train.batch_size=16"),
    ],
)
def test_a_point_that_cannot_be_says_why(changed, reason, config, tmp_path):
    (point,) = points(asked(config, nodes=(2,), **{"vary": {}} | changed), tmp_path)
    assert reason in point.refused
    assert point.predicted is None


def test_what_does_not_fit_is_not_run_and_what_does_is_planned(tmp_path):
    few, many = points(asked(MOE, nodes=(1, 8), ranks_per_node=8, gpu="h100"), tmp_path)
    assert "does not fit: " in few.refused
    assert not many.refused
    assert many.predicted.fits
    assert many.predicted.machines.world_size == many.ranks == 64


def test_where_there_is_no_tensor_parallelism_the_file_says_nothing_of_sequences(tmp_path):
    file = FOLDER / "psft/qwen2.5-7b-instruct.yaml"
    assert load_config(file).parallel.sequence_parallel
    one, two = points(asked(file, nodes=(1,), ranks_per_node=8, vary={TP: (1, 2)}), tmp_path)
    assert (one.config.parallel.sequence_parallel, two.config.parallel.sequence_parallel) == (None, True)
    said = asked(file, nodes=(1,), ranks_per_node=8, vary={TP: (1,)}, overrides=("parallel.sequence_parallel=true",))
    (one,) = points(said, tmp_path)
    assert "sequence_parallel=True: needs tensor_model_parallel_size > 1" in one.refused


def test_names_of_folders_are_told_apart_and_are_no_overrides(config, tmp_path):
    found = points(asked(config, nodes=(1,), vary={"train.seed": (1,), "data.path": ("a/b", "a=b", "c d")}), tmp_path)
    names = [point.name for point in found]
    assert len(set(names)) == 3
    assert not any(set(name) & set("=/ ") for name in names)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nodes": (1, 0)}, "must be numbers of nodes"),
        ({"nodes": (2, 2)}, "must be numbers of nodes, each once"),
        ({"steps": 2}, "leaves nothing to measure"),
        ({"overrides": ("run.dir=elsewhere",)}, "use --out"),
        ({"vary": {"train.steps": (3, 4)}}, "use --steps"),
        ({"vary": {TP: (1, 1)}}, "names a value twice"),
        ({"vary": {TP: (1, 2)}, "overrides": (f"{TP}=2",)}, "has a value among the overrides too"),
        ({"vary": {"train.batch_size": (8, 16)}, "scaling": "weak"}, "is what --scaling weak varies"),
        ({"gpu": "v100"}, "is not in the table"),
        ({"vary": {"parallel.tensor_parallel": (1, 2)}}, "is not a config key"),
        ({"overrides": ("model.path=nowhere",)}, "its shape is not known"),
    ],
)
def test_sweeps_that_are_refused(changed, words, config, tmp_path):
    with pytest.raises(Refused, match=words):
        points(asked(config, **changed), tmp_path)


def test_the_same_sweep_goes_on_in_its_folder_and_another_is_refused(config, tmp_path):
    folder, first = tmp_path / "sweep", asked(config, vary={TP: (1, 2)})
    check_folder(first, folder)  # there is none yet
    write(first, points(first, folder), folder)
    check_folder(asked(config, nodes=(2, 1), vary={TP: (1, 2)}), folder)
    assert {path.name for path in folder.iterdir()} == {
        "sweep.json", "nodes-1_tp-1.yaml", "nodes-2_tp-1.yaml", "nodes-2_tp-2.yaml"
    }  # fmt: skip
    for changed, words in (
        ({"nodes": (1, 4)}, r"nodes=\[1, 2\] where \[1, 4\]"),
        ({"vary": {TP: (1, 4)}}, "vary="),
        ({"scaling": "weak"}, "scaling='strong' where 'weak'"),
        ({"overrides": ("train.seed=1",)}, "train.seed=1234 where 1 is asked for now"),
    ):
        with pytest.raises(Refused, match=words):
            check_folder(asked(config, **{"vary": {TP: (1, 2)}} | changed), folder)
    config.write_text(config.read_text().replace("pack_length: 512", "pack_length: 256"))
    with pytest.raises(Refused, match="data.pack_length=512 where 256"):
        check_folder(first, folder)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    with pytest.raises(Refused, match="is not empty, and has no sweep.json"):
        check_folder(asked(config), tmp_path)


def test_two_sweeps_do_not_submit_at_once(tmp_path):
    with held(tmp_path), pytest.raises(Refused, match="is in use by another"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


@pytest.fixture
def sweep(config, tmp_path, monkeypatch, capsys):
    """Exit code, output and errors of `megapsft sweep` on nodes without GPUs, where there is no Slurm."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 0\n")
    fixed = ["--cluster", str(tmp_path / "cluster.yaml"), "--out", str(tmp_path / "sweep"), "--steps", "5"]

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["sweep", str(config), *fixed, *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_shows_the_points_and_writes_nothing(sweep, tmp_path):
    code, out, err = sweep("--nodes", "1,2", "--vary", f"{TP}=1,2", "train.seed=7", "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[:5] for line in out.splitlines() if line.strip()[:1].isdigit()] == [
        ["1", "1", "tp=1", "16", "to"], ["1", "1", "tp=2", "16", "impossible"],
        ["2", "2", "tp=1", "16", "to"], ["2", "2", "tp=2", "16", "to"],
    ]  # fmt: skip
    assert "note: nothing is planned: no GPU is named" in out
    assert not (tmp_path / "sweep").exists()


def test_where_nothing_can_run_the_exit_code_says_so(sweep):
    assert sweep("--nodes", "1,2", "--vary", f"{TP}=3", "--dry-run")[0] == 2


def test_without_slurm_the_points_are_written_all_the_same(sweep, tmp_path):
    code, out, err = sweep("--nodes", "1,2", "--vary", f"{TP}=1,2", "train.seed=7")
    assert (code, out) == (2, "")
    assert "sbatch: is not here" in err
    assert load_config(tmp_path / "sweep/nodes-2_tp-2.yaml").train.seed == 7  # and --vary's value was none of the overrides
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["overrides"] == ["train.seed=7"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "1,two"], "--nodes 1,two: is not a list of numbers"),
        (["--nodes", "1", "--dry-run", "--report-only"], "exclude each other"),
        (["--nodes", "1", "--report-only"], "is no sweep yet"),
        (["--nodes", "1", "cluster.gpus=1"], "gpus: is not a config key"),
    ],
)
def test_command_lines_that_are_refused(arguments, words, sweep):
    code, _, err = sweep(*arguments)
    assert code == 2
    assert words in err
