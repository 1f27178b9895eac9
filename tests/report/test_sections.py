"""What a report shows, from records that are made up. Not here: how it is drawn (test_figure.py), and the page (test_page.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megapsft.errors import Refused
from megapsft.report.figure import Mark, Span
from megapsft.report.folders import Pipeline, Shown, Sweep, names, read_folders
from megapsft.report.lines import Curve, chart, epochs, switched, warmups
from megapsft.report.page import page
from megapsft.report.run import Run
from megapsft.report.sections import (
    benchmarks,
    configs,
    noise,
    overview,
    pipelines,
    preferences,
    remaining,
    rewards,
    speed,
    sweeps,
    training,
)
from megapsft.report.sections.speed import step_parts

NLL = Curve(name="nll", title="nll", unit="nats", keys={"objective/nll": ""})


def update(number: int, step: int, **changes) -> dict:
    plain = {
        "update": number,
        "step": step,
        "phase": "train",
        "objective": "psft",
        "data/samples": 8,
        "objective/nll": 4.0 / number,
    }
    return plain | changes


def run(name: str = "psft", colour: int = 0, **changes) -> Run:
    """Two updates a step, two steps; an epoch is three updates long."""
    updates = [update(1, 1), update(2, 1), update(3, 2), update(4, 2)]
    steps = [{"update": 2, "step": 1, "epoch": 2 / 3}, {"update": 4, "step": 2, "epoch": 4 / 3}]
    return Run(**{"name": name, "colour": colour, "updates": updates, "steps": steps} | changes)


def of(section, **kinds) -> dict:
    """Name -> figure."""
    return {figure.name: figure for figure in section(Shown(**kinds)).figures}


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name.replace("_", "-").replace("-jsonl", ".jsonl").replace("-json", ".json").replace("-yaml", ".yaml")
        lines = name.endswith("jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
    return folder


def test_the_same_records_over_updates_steps_and_samples():
    found = switched(NLL, [run()]).charts
    assert {axis: list(one.lines[0].x) for axis, one in found.items()} == {
        "update": [1, 2, 3, 4], "step": [0.5, 1, 1.5, 2], "samples": [8, 16, 24, 32],
    }  # fmt: skip
    assert found["update"].lines[0].y == [4.0, 2.0, 4 / 3, 1.0]
    assert [one.x_label for one in found.values()] == ["updates", "steps", "samples"]


def test_gaps_single_records_and_runs_that_have_no_such_number():
    one = run("one", updates=[update(5, 3)])
    gap = run("gap", updates=[update(1, 1), update(2, 1, **{"objective/nll": None}), update(3, 2)])
    none = run("none", updates=[{"update": 1, "step": 1}])
    lines = {line.name: line for line in chart(NLL, [one, gap, none]).lines}
    assert set(lines) == {"one", "gap"}
    assert lines["one"].y == [0.8]
    assert math.isnan(lines["gap"].y[1])
    assert switched(NLL, [none]) is None
    assert switched(NLL, []) is None


def test_several_keys_bands_and_errors():
    both = Curve(name="r", title="r", unit="", keys={"rewards/chosen": "chosen", "rewards/rejected": "rejected"})
    pairs = [update(1, 1, **{"rewards/chosen": 1.0, "rewards/rejected": -1.0})]
    alone, several = (chart(both, [run(n, c, updates=pairs) for c, n in enumerate(own)]).lines for own in (["a"], ["a", "b"]))
    assert [(line.name, line.colour, line.dashed) for line in alone] == [("a chosen", 0, False), ("a rejected", 1, False)]
    assert [(line.name, line.colour, line.dashed) for line in several][2:] == [("b chosen", 1, False), ("b rejected", 1, True)]
    band = Curve(name="q", title="q", unit="", keys={"m": ""}, band=("l", "h"), size=2)
    (line,) = chart(band, [run(updates=[update(1, 1, m=4.0, l=2.0, h=6.0)])]).lines
    assert (line.low, line.y, line.high) == ([1.0], [2.0], [3.0])
    evaluated = run(evaluations=[{"update": 0, "step": 0, "evaluate/t/avg": 0.5, "evaluate/t/avg_se": 0.1}])
    (line,) = of(benchmarks.section, runs=[evaluated])["benchmark-0"].charts["samples"].lines
    assert (line.x, line.low, line.y, line.high) == ([0.0], [pytest.approx(30)], [50.0], [pytest.approx(70)])


def test_ends_of_epochs_lie_between_steps():
    assert epochs([run()], "update") == [Mark(3.0, "epoch 1")]
    assert epochs([run()], "step") == [Mark(pytest.approx(1.5), "epoch 1")]
    assert epochs([run()], "samples") == [Mark(pytest.approx(24.0), "epoch 1")]
    other = run("other", 1, steps=[{"update": 4, "step": 2, "epoch": 1.0}])
    assert epochs([run(), other, run("same", 2)], "update") == [Mark(3.0, "epoch 1"), Mark(4.0, "epoch 1", 1)]
    many = run(steps=[{"update": 4, "step": 2, "epoch": 100.0}])
    assert [mark.name for mark in epochs([many], "update")][:2] == ["epoch 9", "epoch 18"]


def test_the_warm_up_is_shaded_to_the_end_of_the_longest():
    warm = [update(1, 1, phase="warmup", objective="sft"), update(2, 1, phase="warmup", objective="sft"), update(3, 2)]
    assert warmups([run(updates=warm)], "update") == [Span(1.0, 2.0, "warm-up")]
    assert warmups([run(updates=warm), run("sft", 1)], "step") == [Span(0.5, 1.0, "warm-up of psft")]
    assert warmups([run()], "update") == []


def test_the_table_of_runs():
    records = {"train/skipped_updates": 1, "policy/entropy": 0.5}
    shown = run(
        updates=[update(1, 1, phase="warmup", objective="sft"), update(2, 2, **records)],
        steps=[{"update": 2, "step": 2, "perf/tokens_per_second": 1234.5}],
        evaluations=[{"update": 2, "step": 2, "evaluate/t/avg": 0.5, "evaluate/t/avg_se": 0.125}],
        config={"train.steps": 9, "train.sft_warmup_steps": 1},
        revision="megapsft 0.1.0 " + "0123456789" * 4 + "-dirty",
    )
    first, second = overview.runs_table([shown, Run(name="begun")]).rows
    assert first == [
        "psft", "sft → psft", "2 of 10", "2", "16", "1", "2.000", "0.500", "t 50.0 ± 12.5", "1,234",
        "megapsft 0.1.0 0123456789-dirty",
    ]  # fmt: skip
    assert second == ["begun", "–", "0", "0", "0", "–", "–", "–", "–", "–", "–"]
    assert [row[:3] for row in overview.phases_table([shown]).rows] == [
        ["psft", "warm-up (SFT)", "1"],
        ["psft", "train (PSFT)", "1 (1 skipped)"],
    ]


def test_only_keys_that_differ_folders_apart():
    a = run("a", config={"optimizer.lr": 1e-3, "train.steps": 5, "run.dir": "runs/a", "data.columns": {"prompt": "q"}})
    b = run("b", config={"optimizer.lr": 1e-4, "train.steps": 5, "run.dir": "runs/b", "objective.beta": 0.1})
    found = of(configs.section, runs=[a, b])
    assert found["config"].rows == [
        ["optimizer.lr", "0.001", "0.0001"], ["data.columns", '{"prompt": "q"}', "–"], ["objective.beta", "–", "0.1"]
    ]  # fmt: skip
    assert found["config-folders"].rows == [["run.dir", "runs/a", "runs/b"]]
    assert configs.section(Shown(runs=[a, a])).note == "The configs of the runs are the same."


def test_one_run_is_laid_beside_the_defaults():
    found = of(configs.section, runs=[run(config={"objective.name": "sft", "train.steps": 7, "train.seed": 1234})])
    assert found["config"].heading == ["key", "value", "default"]
    assert ["train.steps", "7", "100"] in found["config"].rows


def test_where_a_step_goes():
    record = {"update": 1, "step": 1, "perf/seconds": 4.0, "perf/forward_backward_seconds": 2.0, "perf/optimizer_seconds": 1.0}
    record |= {"perf/tokens_per_second": 1.0, "perf/tflops_per_device": 1.0}
    bars = step_parts([run(steps=[record, record | {"perf/forward_backward_seconds": 3.0}]), run("old", steps=[])])
    assert bars.names == ["psft"]
    assert {series.name: list(series.values) for series in bars.series} == {
        "forward backward": [2.5], "optimizer": [1.0], "other": [0.5],
    }  # fmt: skip


def test_memory_throughput_rewards_and_preferences_have_their_units():
    record = {"update": 2, "step": 1, "perf/memory_bytes": 2**31, "perf/mfu": 0.5, "reward/mean": 0.25, "reward/math_answer": 0.5}
    memory = of(speed.section, runs=[run(steps=[record])])
    assert memory["memory"].charts["step"].lines[0].y == [2.0]
    assert memory["memory"].charts["step"].y_label == "GiB"
    assert memory["mfu"].charts["step"].lines[0].y == [50.0]
    earned = of(rewards.section, runs=[run(steps=[record])])
    assert {name: figure.title for name, figure in earned.items()} == {"reward": "Reward", "reward-0": "Reward: math_answer"}
    told = of(preferences.section, runs=[run(updates=[update(1, 1, **{"rewards/margins": 0.5})])])
    assert list(told) == ["dpo-margin"]
    assert preferences.section(Shown(runs=[run()])) is None


def test_noise_that_the_gate_measured():
    found = {"count": 1000, "unit": "ratios", "differ": 0.5, "mean_abs_log_ratio": 0.001, "clipped": 0.002, "limit": 0.01}
    shown = of(noise.section, runs=[run(noise=found | {"quantiles": {"0.5": 0.001, "0.99": 0.02}}), run("exact")])
    assert shown["noise"].rows == [["psft", "1,000 ratios", "50", "0.001", "0.2", "1"]]
    assert (shown["noise-quantiles"].names, shown["noise-quantiles"].series[0].values) == (
        ["50 % quantile", "99 % quantile"], [0.001, 0.02],
    )  # fmt: skip
    assert noise.section(Shown(runs=[run()])) is None


def test_what_no_section_knows_is_drawn_and_what_never_changes_is_said():
    records = [update(n, 1, **{"mine/new": float(n), "data/trained_tokens": 5, "train/lr": 0.1}) for n in (1, 2)]
    found = remaining.section(Shown(runs=[run(updates=records)]))
    assert [figure.title for figure in found.figures] == ["mine/new"]
    assert found.note == "The same throughout: data/samples 8, data/trained_tokens 5."


def test_every_key_that_a_section_names_is_a_metric():
    from megapsft.metrics.names import METRICS

    for curve in (*training.CURVES, *preferences.CURVES, *rewards.CURVES, *speed.CURVES):
        assert {*curve.keys, *(curve.band or ())} <= set(METRICS), curve.name


HAND_OFF = [
    {"stage": stage, "benchmark": "t", "problems": 4, "n": 2, "avg": avg, "avg_se": 0.125, "length": 9.0, "entropy": 1.0,
     "kl_k1": -0.5, "kl_k3": 0.25}
    for stage, avg in (("start", 0.25), ("psft", 0.5))
]  # fmt: skip
POINTS = [
    {"nodes": nodes, "ranks": nodes, "split": "", "batch_size": 8, "state": "done", "why": "", "planned": None,
     "measured": {"tokens_per_second": 100.0 * nodes**0.5, "tokens_per_second_per_rank": 1.0, "efficiency": nodes**-0.5,
                  "seconds_per_step": 1.0, "memory_bytes": 2**30}}
    for nodes in (1, 4)
]  # fmt: skip


def test_what_stages_made_of_the_model():
    found = of(pipelines.section, pipelines=[Pipeline(name="p", rows=HAND_OFF)])
    assert found["hand-off-p"].rows[1][:5] == ["psft", "t", "4", "2", "50.00 ± 12.50"]
    accuracy = found["hand-off-p-avg"]
    assert (accuracy.names, list(accuracy.series[0].values), list(accuracy.series[0].errors)) == (
        ["start", "psft"],
        [25, 50],
        [12.5] * 2,
    )
    assert found["hand-off-p-length"].series[0].errors is None
    assert "p" in pipelines.section(Shown(pipelines=[Pipeline(name="p", rows=[])])).note


def test_how_a_run_scales():
    found = of(sweeps.section, sweeps=[Sweep(name="s", rows=POINTS, notes=["one note"])])
    speeds = found["s-tokens_per_second"]
    assert [(line.name, list(line.x), list(line.y)) for line in speeds.lines] == [
        ("measured", [1, 4], [100.0, 200.0]), ("ideal", [1, 4], [100.0, 400.0]),
    ]  # fmt: skip
    assert found["s-efficiency"].lines[0].y == [100.0, 50.0]
    assert found["scaling-s"].note == "one note."


def test_folders_are_known_by_what_lies_in_them(tmp_path):
    write(tmp_path / "p" / "psft", metrics_jsonl=[update(1, 1)], config_yaml={"train": {"steps": 3}})
    write(tmp_path / "p" / "later", metrics_jsonl=[])
    write(tmp_path / "p" / "start", hand_off_json={"identity": "", "rows": []})
    write(tmp_path / "p", hand_off_json=HAND_OFF, psft_yaml={}, later_yaml={}, start_yaml={})
    write(tmp_path / "psft", metrics_jsonl=[update(1, 1)])
    with (tmp_path / "psft" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2, "st')  # being written
    write(tmp_path / "s", sweep_json={}, report_json={"points": POINTS, "notes": []})
    shown = read_folders([tmp_path / "p", tmp_path / "psft", tmp_path / "s"])
    assert [one.name for one in shown.runs] == ["p/psft", "later", f"{tmp_path.name}/psft"]
    assert [one.colour for one in shown.runs] == [0, 1, 2]
    assert shown.runs[0].config == {"train.steps": 3}
    assert [len(one.updates) for one in shown.runs] == [1, 0, 1]
    assert ([one.name for one in shown.pipelines], [one.name for one in shown.sweeps]) == (["p"], ["s"])
    assert all(part in page(shown) for part in ("From stage to stage", "Training", "Scaling", "p/psft"))


@pytest.mark.parametrize(
    ("folders", "rule"),
    [
        ([], "at least one folder"),
        (["empty"], "neither a run nor a pipeline nor a sweep"),
        (["missing"], "neither a run nor a pipeline nor a sweep"),
        (["run", "run"], "named twice"),
        (["sweep"], "without report.json"),
        (["start"], "holds no list"),
    ],
)
def test_other_folders_are_refused(folders, rule, tmp_path):
    write(tmp_path / "run", metrics_jsonl=[update(1, 1)])
    write(tmp_path / "empty", other_json={})
    write(tmp_path / "sweep", sweep_json={})
    write(tmp_path / "start", hand_off_json={})
    with pytest.raises(Refused, match=rule):
        read_folders([tmp_path / name for name in folders])


def test_names_are_as_long_as_they_have_to_be():
    assert names([Path("/a/x/run"), Path("/b/x/run"), Path("/b/other")]) == ["a/x/run", "b/x/run", "other"]
