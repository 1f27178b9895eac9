"""The benchmark of the converters runs, and what it says is what it measured. Not here: its figures."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "convert.py"
TINY = ("--gb", "0.006", "--rounds", "2", "--bridge-python", "false")  # a peer that fails


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("benchmark_convert", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(BENCHMARK), *TINY, "--scratch", str(scratch), "--out", str(folder / "new" / "convert")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not any(scratch.iterdir()), "what a run wrote is gone after it"
    assert (folder / "new" / "convert.png").stat().st_size > 5_000
    return done.stdout, json.loads((folder / "new" / "convert.json").read_text())


def test_all_take_turns_and_the_round_trip_is_bitwise(ran):
    (size,) = ran[1]["sizes"]
    assert size["source"]["narrowed"]
    assert size["source"]["bytes"] >= 6_000_000
    assert size["round_trip"] == {
        "tensors": size["source"]["tensors"],
        "bytes": size["source"]["bytes"],
        "bitwise_equal": True,
    }
    order = {number: [turn["what"] for turn in size["turns"] if turn["round"] == number] for number in (0, 1)}
    copies = [name for name in ("cp", "dd") if name not in size["left_out"]]  # dd wants O_DIRECT
    assert order[0] == [*copies, "import", "export", "transformers"]
    assert order[1] == [*copies[1:], "import", "export", "cp"]
    assert "ended with 1" in size["left_out"]["bridge"]


def test_json_holds_every_turn_and_ratios_to_cp_of_its_round(ran):
    result = ran[1]
    assert {"cpus", "kernel", "filesystem", "torch", "transformers", "python"} <= set(result["machine"])
    (size,) = result["sizes"]
    for turn in size["turns"]:
        assert turn["written_bytes"] >= size["source"]["bytes"]
        assert turn["seconds"] >= turn["sync_seconds"] >= 0
        assert turn["cpu_seconds"] > 0
    by_round = {(turn["what"], turn["round"]): turn for turn in size["turns"]}
    ratios = sorted(by_round["import", number]["seconds"] / by_round["cp", number]["seconds"] for number in (0, 1))
    assert size["summary"]["import"]["wall_over_cp"] == pytest.approx(sum(ratios) / 2)
    assert size["summary"]["import"]["wall_over_cp_range"] == pytest.approx(ratios)
    assert size["summary"]["cp"]["wall_over_cp_range"] == [1, 1]
    assert result["floor_rss_bytes"] < 100_000_000 < size["summary"]["import"]["max_rss_bytes"], "torch is in one of them only"


def test_the_table_has_a_row_for_each(ran):
    rows = [line.split("|")[2].strip() for line in ran[0].splitlines() if line.startswith("|")][2:]
    assert rows == list(ran[1]["sizes"][0]["summary"])
    assert {"cp", "import", "export", "transformers"} <= set(rows)


def test_several_sizes_are_drawn_side_by_side(ran, convert, tmp_path):
    result = json.loads(json.dumps(ran[1]))
    result["sizes"] += json.loads(json.dumps(result["sizes"]))
    del result["sizes"][1]["summary"]["transformers"]  # it did not fit
    for drawn in convert.pictures(result):
        assert len(drawn.series) == 2
        assert not any(map(math.isnan, drawn.series[0].values))
        assert [math.isnan(value) for value in drawn.series[1].values] == [name == "transformers" for name in drawn.names]
    rows = [line.split("|")[2].strip() for line in convert.table(result).splitlines()[2:]]
    assert rows == [name for size in result["sizes"] for name in size["summary"]]
    assert rows.count("import") == 2
    assert rows.count("transformers") == 1


def test_layers_are_the_real_ones_where_one_fits(convert):
    for gigabytes, layers in ((3, 2), (8, 6), (16, 12)):
        shape = convert.shape_of(gigabytes)
        assert (shape.layers, shape.narrowed_by) == (layers, 1)
        assert gigabytes * 1e9 <= shape.nbytes < gigabytes * 1e9 + 1.3e9
    tensors = convert.shape_of(8).tensors
    assert tensors["model.layers.5.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert tensors["model.layers.0.self_attn.k_proj.weight"] == (512, 2048)
    assert tensors["lm_head.weight"] == (151_936, 2048)


@pytest.fixture
def source(convert, tmp_path):
    convert.make(convert.shape_of(0.006), tmp_path / "hf", seed=1)
    return tmp_path / "hf"


def test_numbers_are_finite_and_random(convert, source):
    for place in list(convert.places(source).values())[:20]:
        bits = np.frombuffer(b"".join(place.chunks()), dtype="<u2")
        assert ((bits >> 7) & 0xFF).max() < 0xFF, "infinite or not a number"
        assert len(np.unique(bits)) > len(bits) // 100 + 1


def test_comparing_finds_one_flipped_bit_and_a_lost_tensor(convert, source, tmp_path):
    other = tmp_path / "other"
    convert.make(convert.shape_of(0.006), other, seed=1)
    assert convert.compare(source, other)["bitwise_equal"]
    place = convert.places(other)["model.layers.0.mlp.experts.3.up_proj.weight"]
    data = bytearray(place.file.read_bytes())
    data[place.offset + place.size - 1] ^= 1
    place.file.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj\.weight differs"):
        convert.compare(source, other)
    place.file.unlink()
    with pytest.raises(RuntimeError, match="names differ"):
        convert.compare(source, other)


def test_grandchildren_count(convert):
    busy = "sum(i * i for i in range(3_000_000)); held = bytearray(200_000_000); import time; time.sleep(0.3)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}], check=True)"
    alone = convert.measure([sys.executable, "-c", "pass"])
    found = convert.measure([sys.executable, "-c", nested])
    assert found["cpu_seconds"] > 2 * alone["cpu_seconds"]
    assert found["max_rss_bytes"] > 200_000_000
    assert found["tree_rss_bytes"] > 200_000_000


def test_a_command_that_fails_says_why(convert):
    with pytest.raises(RuntimeError, match="ended with 3:\nno such thing"):
        convert.measure(["sh", "-c", "echo no such thing >&2; exit 3"])


def test_a_peer_that_does_not_fit_into_memory_is_left_out(convert):
    why = convert.left_out(["transformers"], 10**15, None)
    assert why["transformers"].startswith("needs about 1500000.0 GB")
    assert why["bridge"] == "not asked for"
