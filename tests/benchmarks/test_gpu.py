"""The benchmark of a GPU runs on a CPU at tiny sizes, part by part, and what it claims follows from what it measured.

Not here: any figure of a GPU; and Triton, FP8 and Transformer Engine, which need one (tests/gpu).
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
FP8 = {f"{slice_}-fp8-{recipe}" for slice_ in ("dense", "moe") for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")}
WITH_OURS = ("dense-bf16", "moe-bf16")


def benchmark(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "new"
    done = benchmark("--device", "cpu", "--tiny", "--minutes", 60, "--json", folder / "gpu.json")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture
def module(monkeypatch):
    """name -> a module of the benchmark."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def lines(result, part):
    """The lines of a part, all of which must have been measured, or need a GPU."""
    found = result["parts"][part]["lines"]
    bad = {name: line for name, line in found.items() if line["status"] not in ("measured", "needs")}
    assert not bad
    return {name: line for name, line in found.items() if line["status"] == "measured"}


def test_every_part_is_measured_or_says_what_it_needs(result):
    assert {"gpu", "driver", "torch", "megatron-core", "transformers", "transformer-engine", "megapsft"} <= set(result["machine"])
    assert result["tiny"]
    assert {part for part, found in result["parts"].items() if found["status"] == "needs"} == FP8
    assert {result["parts"][part]["error"] for part in FP8} == {"needs CUDA and Transformer Engine"}
    others = set(result["parts"]) - FP8
    assert others == {"ceiling", "head", "dense-bf16", "dense-peer", "moe-bf16", "moe-peer"}
    assert {result["parts"][part]["status"] for part in others} == {"measured"}


def test_the_ceiling_is_the_most_of_any_shape(result):
    found = lines(result, "ceiling")
    assert len(found) == 1 + 2 * 3 + 1  # the square, three products of the head at two widths, the copy
    flops = {name: line["flop"] / median(line["seconds"]) for name, line in found.items() if name != "copy"}
    ceiling = result["figures"]["ceiling"]
    assert ceiling["bf16_flops"] == pytest.approx(max(flops.values()))
    assert ceiling["copy_bytes_per_second"] == pytest.approx(found["copy"]["bytes"] / median(found["copy"]["seconds"]))
    assert ceiling["fp8_flops"] is None


def test_the_head_is_held_against_the_ceiling_and_plain_logits(result):
    found, ceiling = lines(result, "head"), result["figures"]["ceiling"]["bf16_flops"]
    assert set(found) == {f"D={d} T={t} {name}" for d, t in ((32, 48), (32, 96), (64, 96)) for name in ("torch", "plain")}
    for name, line in found.items():
        assert line["forward_flop"] == 2 * int(name.split()[0][2:]) * int(name.split()[1][2:]) * 512
        assert line["largest_difference_of_logprobs"] < 0.05
        figures = result["figures"]["head"][name]
        floor = line["products"] / 2 * line["forward_flop"] / ceiling
        assert figures["forward_backward_over_floor"] == pytest.approx(median(line["forward_backward_seconds"]) / floor)
        assert figures["forward_over_floor"] == pytest.approx(median(line["forward_seconds"]) * ceiling / line["forward_flop"])
    assert {name.split()[-1]: line["products"] for name, line in found.items()} == {"torch": 8, "plain": 6}


@pytest.mark.parametrize("part", WITH_OURS)
def test_steps_of_a_slice(result, part):
    found, facts, figures = lines(result, part), result["parts"][part]["facts"], result["figures"]["steps"]
    assert set(found) == {"build", "4k sft", "4k psft", "32k sft", "32k psft"}
    sparse = part.startswith("moe")
    assert facts["parameters"] == result["parts"][part.replace("bf16", "peer")]["facts"]["parameters"]
    assert bool(facts["balance"]) == sparse
    attention, mlp = 64 * (64 + 2 * 32) + 64 * 64, 64 * 8 + 2 * 3 * 64 * 32 if sparse else 3 * 64 * 128
    assert facts["active_weights_of_a_layer"] == attention + mlp
    assert facts["linear"] == "ColumnParallelLinear"
    for name, line in found.items():
        if name == "build":
            continue
        one, seconds = figures[f"{part} {name}"], median(line["seconds"])
        assert one["tokens_per_second"] == pytest.approx(line["tokens"] / seconds)
        assert one["of_ceiling"] == pytest.approx(line["model_flop"] / seconds / result["figures"]["ceiling"]["bf16_flops"])
        assert one["mfu"] is None  # nobody says what a CPU's peak is
        assert all(0 < loss < 20 for loss in line["losses"] if "psft" not in name)
        sample = {"4k": 16, "32k": 32}[name.split()[0]]
        attention = 4 * 64 * sample / 2
        flop = 3 * (2 * (2 * facts["active_weights_of_a_layer"] + attention) + 2 * 512 * 64)
        assert line["model_flop"] == pytest.approx(line["tokens"] * flop)
    for packing in ("4k", "32k"):
        sft, psft = (found[f"{packing} {name}"] for name in ("sft", "psft"))
        peer = lines(result, part.replace("bf16", "peer"))[f"{packing} sft"]
        assert sft["tokens"] == peer["tokens"] == psft["tokens"] / 4 == 128
        assert sft["losses"][0] == pytest.approx(peer["losses"][0], rel=0.1)  # of random weights: the logarithm of the vocabulary
        assert (psft["updates"], len(psft["losses"]), psft["ratio_max"][0]) == (4, 4, 1.0)
        one = figures[f"{part} {packing} sft"]
        assert one["over_peer"] == pytest.approx(median(peer["seconds"]) / median(sft["seconds"]))
        per_layer = median(sft["seconds"]) - sft["optimizer_seconds"] - sft["head_seconds"]
        assert one["seconds_per_layer_per_token"] == pytest.approx(per_layer / 2 / 128)
        assert 0 < figures[f"{part} {packing} psft"]["old_policy_share"] < 1


def test_the_page_and_the_picture_lie_beside_the_json(folder, result):
    page = (folder / "gpu.md").read_text()
    assert "At tiny sizes, which say nothing of speed." in page
    assert (folder / "gpu.png").stat().st_size > 10_000
    for part in FP8:
        assert f"| {part} | needs CUDA and Transformer Engine |" in page
    for name, one in result["figures"]["head"].items():
        assert f"| {name} | {one['forward_seconds'] * 1e3:.1f} |" in page
    assert "**missed**" not in page  # tiny sizes meet no aim, and miss none


def test_what_was_measured_today_is_kept(folder, result, tmp_path):
    shutil.copy(folder / "gpu.json", tmp_path / "gpu.json")
    done = benchmark("--device", "cpu", "--tiny", "--keep", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-4000:]
    again = json.loads((tmp_path / "gpu.json").read_text())
    if again["date"] == result["date"]:  # or midnight came in between
        assert "s left" not in done.stdout
        assert again["parts"] == result["parts"]


def test_of_another_machine_version_or_day_nothing_is_kept(result, module, tmp_path):
    gpu, file = module("gpu"), tmp_path / "gpu.json"
    measured = {part for part, found in result["parts"].items() if found["status"] == "measured"}
    file.write_text(json.dumps(result))
    assert set(gpu.kept(file, result)) == measured
    assert gpu.kept(tmp_path / "none.json", result) == {}
    assert set(gpu.kept(file, result | {"machine": result["machine"] | {"driver": "580.1"}})) == measured  # of one pool
    for other in ({"date": "2026-01-01"}, {"tiny": False}, {"machine": result["machine"] | {"torch": "2.6"}}):
        assert gpu.kept(file, result | other) == {}


def test_parts_that_a_gpu_lacks_something_for(module):
    gpu = module("gpu")
    h200 = {"gpu": "NVIDIA H200", "capability": [9, 0], "transformer-engine": "2.19.0"}
    assert [part for part in gpu.PARTS if gpu.unmet(part, h200)] == ["dense-fp8-mxfp8", "moe-fp8-mxfp8"]
    assert gpu.unmet("moe-fp8-mxfp8", h200)["error"] == "needs a GPU of compute capability 10.0 or higher"
    assert not any(gpu.unmet(part, h200 | {"capability": [10, 0]}) for part in gpu.PARTS)
    assert {part for part in gpu.PARTS if gpu.unmet(part, h200 | {"transformer-engine": None})} == FP8


def test_a_process_that_ends_takes_no_other_part_with_it(module, capsys):
    gpu = module("gpu")
    options = argparse.Namespace(device="nowhere", tiny=True)
    found = gpu.in_a_process(["ceiling", "head"], options, 60.0, "2026-11-21")
    assert found["ceiling"]["status"] == "failed"
    assert found["ceiling"]["error"].startswith("ended with 2: ")
    assert "nowhere" in found["ceiling"]["error"]
    assert found["head"]["status"] == "not reached"
    assert "error" in capsys.readouterr().err


def test_a_process_that_takes_too_long_is_ended(module):
    gpu = module("gpu")
    options = argparse.Namespace(device="cpu", tiny=True)
    found = gpu.in_a_process(["ceiling"], options, 0.1 - gpu.GRACE_SECONDS, "2026-11-21")
    assert (found["ceiling"]["status"], found["ceiling"]["error"]) == ("failed", "killed after 0 s")


def test_parts_for_which_there_is_no_time_are_listed(module, tmp_path):
    gpu, report = module("gpu"), module("gpu_parts.report")
    options = argparse.Namespace(json=tmp_path / "gpu.json", minutes=0.1, only=None, keep=False, device="cpu", tiny=True)
    gpu.run(options)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {part for part, one in found["parts"].items() if one["status"] == "not reached"} == set(gpu.PARTS) - FP8
    assert "| moe-peer | not reached |" in report.text(found, {}, "gpu.json", "")


def test_a_line_that_fails_or_comes_too_late_takes_no_other_with_it(module, tmp_path):
    kept = module("gpu_parts.lines")
    made = kept.Lines(tmp_path / "lines.json", "part", time.monotonic() + 60, lambda: None)

    def fails():
        raise RuntimeError("no kernel in\n /usr/lib/python3/site-packages/some.so")

    def lacks():
        raise kept.Unmet("needs CUDA")

    made.add("good", lambda: {"seconds": [1.0]})
    made.add("bad", fails)
    made.add("elsewhere", lacks)
    assert kept.status_of(made.lines) == "partly"
    made.deadline = 0.0
    made.add("late", lambda: {"seconds": [1.0]})
    written = json.loads((tmp_path / "lines.json").read_text())["part"]["lines"]
    assert written == {
        "good": {"status": "measured", "seconds": [1.0]},
        "bad": {"status": "failed", "error": "RuntimeError: no kernel in some.so"},
        "elsewhere": {"status": "needs", "error": "needs CUDA"},
        "late": {"status": "not reached"},
    }
    by_status = {line["status"]: {"line": line} for line in written.values()}
    assert {status: kept.status_of(found) for status, found in by_status.items()} == {status: status for status in by_status}


def test_aims_are_judged_by_the_worst_line(module):
    figures, report = module("gpu_parts.figures"), module("gpu_parts.report")
    line = {"status": "measured", "tokens": 100, "peak_bytes": 1}
    product = {"status": "measured", "flop": 8e14, "seconds": [1.0]}
    head = {"forward_flop": 1e14, "forward_seconds": [0.2], "products": 8, "peak_bytes_beside_gradients": 1, "status": "measured"}
    parts = {
        "ceiling": {"lines": {"bf16 square": product, "copy": {"status": "failed", "error": "of memory"}}},
        "head": {"lines": {
            "D=1 T=1 triton": head | {"forward_backward_seconds": [0.6]},
            "D=2 T=1 triton": head | {"forward_backward_seconds": [0.8]},
        }},
        "dense-bf16": {"facts": {"layers": 8}, "lines": {
            "4k sft": line | {"seconds": [1.0], "model_flop": 5e14}, "32k sft": line | {"seconds": [1.0], "model_flop": 4e14},
        }},
        "dense-peer": {"facts": {"layers": 8}, "lines": {"4k sft": line | {"seconds": [1.6]}}},
        "moe-bf16": {"facts": {"layers": 4}, "lines": {"4k sft": {"status": "not reached"}}},
    }  # fmt: skip
    machine = {"peak_bf16_flops": 1e15, "gpu": "NVIDIA H200", "driver": "580", "python": "3.12.3", "torch": "2.11.0"}
    result = {"date": "2026-12-01", "tiny": False, "machine": machine, "parts": parts}
    found = {aim["aim"]: aim["found"] for aim in figures.figures(result)["aims"]}
    assert found == {"head_over_floor": pytest.approx(1.6), "dense_mfu": 0.4, "moe_mfu": None, "over_peer": 1.6}
    page = report.text(result, {}, "gpu.json", "")
    assert "2026-12-01, one NVIDIA H200 (driver 580); Python 3.12.3, torch 2.11.0." in page
    assert "| 1.40 or less | 1.60 | **missed** |" in page
    assert "| 45% or more | 40% | **missed** |" in page
    assert "| 25% or more | not measured yet |  |" in page
    assert "| 1.50 or more | 1.60 | met |" in page
    assert "| ceiling, copy | failed: of memory |" in page
    assert "| moe-bf16, 4k sft | not reached |" in page


def test_checks_are_told_beside(module):
    report = module("gpu_parts.report")
    checks = {
        "date": "2026-12-01", "machine": {"gpu": "NVIDIA H200"}, "counts": {"passed": 3, "failed": 1},
        "tests": [{"name": "tests/gpu/test_head.py::test_a", "outcome": "failed"}],
    }  # fmt: skip
    page = report.text({}, checks, "gpu.json", "")
    assert "`make test-gpu`, 2026-12-01, NVIDIA H200: 3 passed, 1 failed;" in page
    assert "- `tests/gpu/test_head.py::test_a`: failed" in page
    assert "**Not measured yet**" in page


def test_the_page_of_the_docs_is_what_its_json_gives(tmp_path):
    for file in RESULTS.glob("*gpu.json"):
        shutil.copy(file, tmp_path)
    done = benchmark("--report", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "gpu.md").read_text() == (RESULTS / "gpu.md").read_text(), "run python benchmarks/gpu.py --report"
    assert (tmp_path / "gpu.png").exists() == (RESULTS / "gpu.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--only", "ceiling,heads", "--tiny"], "no part is called heads"),
    ],
)
def test_what_would_measure_nothing_is_refused(arguments, says):
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
