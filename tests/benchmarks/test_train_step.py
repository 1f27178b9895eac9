"""The benchmark of an update runs and writes what it promises. Not here: how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = (
    "--rounds 2 --updates 2 --psft-rounds 2 --warmup 1 --threads 1 --minibatch-size 2 "
    "--hidden-size 32 --num-layers 1 --vocab-size 300 --pack-length 512"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "new" / "train_step.json"
    command = [sys.executable, "benchmarks/train_step.py", *TINY.split(), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, json.loads(file.read_text())


def test_both_sides_compute_the_same(ran):
    first = ran[1]["against_trainer"]["loss_of_first_update"]
    assert first["relative_difference"] < 1e-4
    assert first["ours"] == pytest.approx(first["trainer"], rel=1e-4)
    later = ran[1]["against_trainer"]["relative_differences_of_losses"]
    assert max(later) < 1e-5, "the optimizers differ"


def test_json_holds_raw_times_and_their_ratios(ran):
    result = ran[1]
    assert {"cpus", "threads", "torch", "python"} <= set(result["machine"])
    assert result["settings"]["minibatch_size"] == 2
    assert result["parameters"] > 0
    peer, objectives = result["against_trainer"], result["psft_against_sft"]
    assert [len(peer["seconds"][side]) for side in ("ours", "trainer")] == [4, 4]
    assert len(peer["tokens"]) == 4
    assert peer["ratio"][0] == pytest.approx(sum(peer["seconds"]["trainer"][:2]) / sum(peer["seconds"]["ours"][:2]))
    assert [len(objectives["seconds"][name]) for name in ("sft", "psft")] == [2, 2]
    assert objectives["ratio"][1] == pytest.approx(objectives["seconds"]["psft"][1] / objectives["seconds"]["sft"][1])
    for name in ("ours_over_trainer", "psft_over_sft"):
        ratio = result["ratios"][name]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    for shares in objectives["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert {"data", "forward_backward", "optimizer"} <= set(shares)
    assert "old_policy" not in objectives["shares"]["sft"]
    share = result["ratios"]["old_policy_share_of_psft"]
    assert len(objectives["old_policy_share"]) == 2
    assert 0 < share["min"] <= objectives["shares"]["psft"]["old_policy"] <= share["max"] < 0.5


def test_the_table_comes_last(ran):
    lines = ran[0].rstrip("\n").splitlines()
    assert lines[-1].startswith("└")
    assert any("ours / Trainer" in line for line in lines)
