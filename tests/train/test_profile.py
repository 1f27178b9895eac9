"""Profiles of real runs: what is in them, and that they change nothing. Not here: CUDA's part, and Nsight Systems."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.metrics.names import METRICS, PARTS
from megapsft.models.flops import model_flops
from megapsft.platform.cpu import has_cuda
from megapsft.train.plan import plan_run, with_profile
from megapsft.train.profile import check_profile, check_profiles, next_steps
from tests.ranks import run_ranks
from tests.shipped import FOLDER

CONFIG = str(FOLDER / "psft/tiny-qwen3-gsm8k.yaml")
SMALL = [
    "train.batch_size=8", "train.minibatch_size=4", "train.sft_warmup_steps=1", "train.steps=3", "data.pack_length=512",
    "checkpoint.interval=2", "log.progress=false", "log.tensorboard=false",
]  # fmt: skip
RANGES = {"step", "data", "old_policy", "forward_backward", "microbatch", "head", "head_backward", "optimizer", "checkpoint"}
SPLIT = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def arguments(tiny_models, tiny_data):
    return ["train", CONFIG, f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", *SMALL]


@pytest.fixture(scope="module")
def folders(arguments, tmp_path_factory) -> dict[str, Path]:
    """The same run on two ranks, plain and with both of them watched, and one that knows a peak."""
    root = tmp_path_factory.mktemp("profiles")
    watched = [SPLIT, "--profile", "profile.ranks=[]", "log.peak_flops=1e12"]
    for name, more in (("plain", [SPLIT]), ("watched", watched)):
        assert run_ranks(2, cli.main, [*arguments, f"run.dir={root / name}", *more]) == [0, 0]
    return {name: root / name for name in ("plain", "watched")}


def records(run: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def test_a_watched_run_computes_the_same_bits(folders):
    for file, count in (("metrics.jsonl", 8), ("steps.jsonl", 4)):
        plain, watched = (records(folders[name], file) for name in ("plain", "watched"))
        assert len(plain) == count
        for one, other in zip(plain, watched, strict=True):
            untimed = [{k: v for k, v in r.items() if not k.startswith("perf/") or k == "perf/model_flops"} for r in (one, other)]
            assert untimed[0] == untimed[1]
    assert not (folders["plain"] / "profile").exists()


def test_each_rank_leaves_a_trace_and_its_sums(folders):
    found = folders["watched"] / "profile"
    names = {f"rank-{rank}-steps-2-3" for rank in range(2)}
    assert {path.name.split(".")[0] for path in found.iterdir()} == names
    for name in names:
        with gzip.open(found / f"{name}.pt.trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        assert {"step 2", "step 3"} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
        assert any(event.get("cat") == "cpu_op" for event in events)
        sums = json.loads((found / f"{name}.json").read_text())
        ranges = {one["name"]: one for one in sums["ranges"]}
        assert set(ranges) >= RANGES
        assert (ranges["step"]["calls"], ranges["step"]["share"]) == (2, 1.0)
        assert ranges["step"]["seconds"] == sums["seconds"] > ranges["forward_backward"]["seconds"]
        assert ranges["forward_backward"]["calls"] == 4  # two updates a step
        assert ranges["old_policy"]["calls"] == 2  # of the second update alone
        assert ranges["microbatch"]["calls"] == ranges["head"]["calls"] > ranges["head_backward"]["calls"]
        assert ranges["forward_backward"]["self_seconds"] < ranges["forward_backward"]["seconds"]
        text = (found / f"{name}.txt").read_text()
        assert text.startswith(f"{name}: ")
        assert "forward_backward" in text
        assert sums["operators"][0]["name"] in text


def test_parts_of_a_step_add_up(folders):
    for record in records(folders["watched"], "steps.jsonl"):
        own = {key: record[key] for key in record if key.startswith("perf/")}
        assert set(own) <= set(METRICS)
        parts = {name: own[f"perf/{name}_seconds"] for name in PARTS if f"perf/{name}_seconds" in own}
        assert {"data", "forward_backward", "optimizer"} <= set(parts)
        assert ("old_policy" in parts) == (record["phase"] == "train")
        assert 0 < sum(parts.values()) <= own["perf/seconds"] * 1.001
    assert "perf/checkpoint_seconds" in records(folders["watched"], "steps.jsonl")[1]  # of the warm-up's end
    spent = json.loads((folders["watched"] / "time.json").read_text())
    assert spent["steps"] == 4
    assert sum(part["share"] for part in spent["parts"].values()) == pytest.approx(1)
    assert spent["mfu"] > 0


def test_flops_are_of_the_samples_and_mfu_of_a_known_peak_alone(folders, arguments, tmp_path):
    plan = plan_run(load_config(CONFIG, [argument for argument in arguments[2:]]), 1)
    for number, record in enumerate(records(folders["watched"], "steps.jsonl")):
        lengths = [len(sample) for group in plan.rows.next_groups(number) for sample in group]
        assert record["data/real_tokens"] == sum(lengths)
        assert record["perf/model_flops"] == model_flops(plan.hf, sum(lengths), sum(n * n for n in lengths))
    for record in records(folders["watched"], "metrics.jsonl"):
        by_rank = record["perf/model_flops"] / record["perf/seconds"] / 2
        assert record["perf/tflops_per_device"] == pytest.approx(by_rank / 1e12)
        assert record["perf/mfu"] == pytest.approx(by_rank / 1e12)
    if not has_cuda():
        assert not any("perf/mfu" in record for record in records(folders["plain"], "metrics.jsonl"))
        assert json.loads((folders["plain"] / "time.json").read_text())["mfu"] is None


def test_a_run_that_goes_on_profiles_what_is_to_come(folders, arguments, capsys):
    more = [*arguments, "train.steps=6", f"run.dir={folders['plain']}", "--dry-run", "--profile", SPLIT]
    assert cli.main(more) == 0
    assert "steps 6 to 7 of rank(s) 0: traces in" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not (folders["plain"] / "profile").exists()
    config = load_config(CONFIG, [*arguments[2:], "train.steps=6", f"run.dir={folders['plain']}", "profile.steps=[2, 3]"])
    assert with_profile(plan_run(config, 2)).config.profile.steps == (2, 3)  # behind it: the same command goes on


def test_a_run_that_stops_among_the_steps_leaves_what_there_is(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()  # it does one step
    assert run_ranks(1, cli.main, [*arguments, f"run.dir={tmp_path / 'run'}", "profile.steps=[1, 3]"]) == [0]
    found = json.loads((tmp_path / "run/profile/rank-0-steps-1-1.json").read_text())
    assert {one["name"]: one["calls"] for one in found["ranges"]}["step"] == 1
    assert found["seconds"] > 0


def test_the_steps_of_profile():
    assert next_steps(0, 100) == (2, 3)
    assert next_steps(50, 100) == (52, 53)
    assert next_steps(0, 1) == (1, 1)
    assert next_steps(99, 100) == (100, 100)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("steps=[3, 2]", r"profile.steps=\[3, 2\]: are not the first and the last of steps 1 to 9; use \[2, 3\]"),
        ("steps=[2, 10]", r"profile.steps=\[2, 10\]: are not .* of steps 1 to 9; .* or more train.steps"),
        ("ranks=[0, 2]", r"profile.ranks=\[0, 2\]: 2: is none of the 2 rank\(s\).*; .* use \[\] for all"),
        ("tool=nsys", "profile.tool=nsys: needs CUDA; use profile.tool=torch"),
    ],
)
def test_what_cannot_be_watched_is_refused(option, message):
    config = load_config(None, [f"profile.{option}"]).profile
    if option == "tool=nsys" and has_cuda():
        check_profile(config, 9, 2)
        return
    with pytest.raises(Refused, match=message):
        check_profile(config, 9, 2)


@pytest.mark.parametrize("option", ["details=true", "memory=false", "ranks=[]"])
def test_how_to_watch_is_not_said_where_nothing_is_watched(option):
    profile = load_config(None, [f"profile.{option}"]).profile
    with pytest.raises(Refused, match=f"profile.{re.escape(option)}: is of steps that are watched, and none are"):
        check_profiles(profile)
    check_profiles(dataclasses.replace(profile, steps=(2, 3)))


def test_steps_are_two_numbers():
    for wrong in ("[0, 2]", "[1]", "3"):
        with pytest.raises(Refused, match="profile.steps"):
            load_config(None, [f"profile.steps={wrong}"])
