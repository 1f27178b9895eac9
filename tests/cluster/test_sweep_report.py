"""What a sweep reports of runs that were trained here, on one and two ranks of this machine, and of those that were not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median

import pytest
import yaml

from megapsft import cli
from megapsft.checkpoint.hf import read_config
from megapsft.cluster.estimate import estimate
from megapsft.cluster.hardware import Machines
from megapsft.cluster.memory import RUNTIME
from megapsft.cluster.sweep.measure import notes, rows
from megapsft.cluster.sweep.points import Asked, points
from megapsft.cluster.sweep.sweep import state_of, write
from megapsft.metrics.records import read_records
from megapsft.platform.chips import GPUS
from megapsft.report.scaling import to_markdown, write_scaling
from tests.command import megapsft

TP = "parallel.tensor_model_parallel_size"


@pytest.fixture(scope="module")
def trained(tiny_models, tiny_data, tmp_path_factory) -> tuple[Asked, Path]:
    """A sweep over 1 and 2 nodes of one rank, with and without tensor parallelism; all that can run has."""
    root = tmp_path_factory.mktemp("sweep")
    tree = {
        "model": {"path": str(tiny_models("qwen3")), "dtype": "float32"},
        "data": {"path": str(tiny_data), "columns": {"prompt": "question", "demonstration": "answer"}, "pack_length": 512},
        "train": {"batch_size": 8, "minibatch_size": 4},
        "log": {"tensorboard": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    asked = Asked(config=str(root / "config.yaml"), nodes=(1, 2), vary={TP: (1, 2)}, steps=5, ranks_per_node=1)
    found = points(asked, root / "sweep")
    write(asked, found, root / "sweep")
    for point in found:
        if not point.refused:
            command = "train", str(root / "sweep" / f"{point.name}.yaml"), "--nproc-per-node", str(point.ranks)
            done = megapsft(*command)
            assert done.returncode == 0, done.stderr
    return asked, root / "sweep"


def table(trained) -> dict[str, dict]:
    asked, folder = trained
    found = points(asked, folder)
    return {row["point"]: row for row in rows(found, {point.name: state_of(point) for point in found})}


def test_medians_leave_out_what_has_not_settled(trained):
    for name, row in table(trained).items():
        if row["state"] != "done":
            continue
        records = read_records(trained[1] / name / "steps.jsonl")
        assert len(records) == 5
        seconds = [record["perf/seconds"] for record in records[2:]]
        assert row["measured"]["seconds_per_step"] == median(seconds)
        speeds = [record["data/real_tokens"] / record["perf/seconds"] for record in records[2:]]
        assert row["measured"]["tokens_per_second"] == pytest.approx(median(speeds))
        assert row["measured"]["tokens_per_second_per_rank"] == pytest.approx(median(speeds) / row["ranks"])
        assert row["measured"]["memory_bytes"] == records[-1]["perf/memory_bytes"] > 100 * 2**20  # torch alone takes as much


def test_efficiency_is_against_the_fewest_nodes_of_the_same_split(trained):
    found = table(trained)
    assert {name: row["state"] for name, row in found.items()} == {
        "nodes-1_tp-1": "done", "nodes-1_tp-2": "impossible", "nodes-2_tp-1": "done", "nodes-2_tp-2": "done",
    }  # fmt: skip
    one, two = found["nodes-1_tp-1"]["measured"], found["nodes-2_tp-1"]["measured"]
    assert (one["efficiency"], one["base_nodes"]) == (1, 1)
    assert two["efficiency"] == pytest.approx(two["tokens_per_second"] / 2 / one["tokens_per_second"])
    assert (found["nodes-2_tp-2"]["measured"]["efficiency"], found["nodes-2_tp-2"]["measured"]["base_nodes"]) == (1, 2)


def test_the_report_holds_all_points(trained, tmp_path, monkeypatch, capsys):
    _, folder = trained
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "cluster.yaml").write_text("{gpus_per_node: 0, time: '00:10:00'}\n")
    command = ["sweep", str(folder.parent / "config.yaml"), "--nodes", "1,2", "--vary", f"{TP}=1,2", "--steps", "5"]
    assert cli.main([*command, "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(folder), "--report-only"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert report["points"] == list(table(trained).values())
    markdown = (folder / "report.md").read_text()
    for row in report["points"]:
        shown = f"{row['measured']['tokens_per_second']:,.0f}" if row["measured"] else row["why"]
        assert shown in markdown
        assert shown.split()[0] in printed
    assert "| impossible | – | – |" in markdown
    assert "planned" not in markdown.replace("nothing is planned", "")
    assert "(scaling.png)" in markdown
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_where_a_gpu_is_named_measurements_stand_beside_the_plan(trained, tmp_path):
    asked, folder = trained
    planned = Asked(config=asked.config, nodes=(1, 2), vary={}, steps=5, ranks_per_node=1, gpu="h100")
    for name in ("nodes-1", "nodes-2"):
        shutil.copytree(folder / f"{name}_tp-1", tmp_path / name)
    found = points(planned, tmp_path)
    told = rows(found, {point.name: state_of(point) for point in found})
    for row, point in zip(told, found, strict=True):
        machines = Machines(gpu=GPUS["h100"], nodes=row["nodes"], gpus_per_node=1)
        one = estimate(point.config, read_config(point.config.model.path), machines)
        assert row["planned"]["tokens_per_second"] == one.tokens_per_second
        assert row["planned"]["seconds_per_step"] == one.time.total
        assert row["planned"]["memory_bytes"] == one.peak - RUNTIME
    markdown = to_markdown(told, notes(planned, found))
    assert f"{told[0]['measured']['tokens_per_second'] / told[0]['planned']['tokens_per_second']:.0%}" in markdown
    assert "planned for h100 at the speed of tuned runs; every sample is as long as data.max_length" in markdown


def test_a_run_that_was_interrupted_is_to_be_continued(trained, tmp_path):
    asked, folder = trained
    shutil.copytree(folder / "nodes-1_tp-1", tmp_path / "nodes-1_tp-1")
    steps = tmp_path / "nodes-1_tp-1/steps.jsonl"
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:2]))
    found = points(asked, tmp_path)
    states = {point.name: state_of(point) for point in found}
    assert {name: state.name for name, state in states.items()} == {
        "nodes-1_tp-1": "ended", "nodes-1_tp-2": "impossible", "nodes-2_tp-1": "to do", "nodes-2_tp-2": "to do",
    }  # fmt: skip
    assert states["nodes-1_tp-1"].why == "2 of 5 steps"
    told = rows(found, states)
    assert [row["measured"] for row in told] == [None] * 4
    assert [path.name for path in write_scaling(told, [], tmp_path)] == ["report.json", "report.md"]  # there is nothing to draw
