"""`python -m evidence --ci`: real runs of every kind and all claims, killed on the way and started again.

Not here: what the whole, at full size, finds. That is docs/results/evidence.html.
"""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

from evidence.claims import CLAIMS
from evidence.methods import table
from evidence.page import read_json
from evidence.runs import RESULT
from evidence.sizes import CI

ROOT = Path(__file__).resolve().parents[2]


def command(work, *more):
    return [sys.executable, "-m", "evidence", "--ci", "--work", str(work), *more]


def results(work):
    return {path: path.stat().st_mtime_ns for path in work.glob(f"runs/*/{RESULT}")}


def wait_until_free(lock):
    """Children inherit the lock: it is free once the last of them is gone."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_killed_and_started_again(tmp_path):
    work = tmp_path / "work"
    first = subprocess.Popen(command(work), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(results(work)) < 4:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.1)
    refused = subprocess.run(command(work), cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is another process's" in refused.stderr
    first.kill()
    first.communicate()
    wait_until_free(work / "lock")
    before = results(work)

    second = subprocess.run(command(work), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    after = results(work)
    assert before.items() <= after.items()  # nothing was done again

    tree = json.loads((work / "evidence.json").read_text())
    assert list(tree["claims"]) == [claim.letter for claim in CLAIMS]
    assert {one["outcome"] for one in tree["claims"].values()} <= {"holds", "does not hold", "undecided"}
    found, sizes, _ = read_json(work / "evidence.json")
    assert sizes == CI
    assert list(found) == list(table(CI))
    assert all(run.trained_tokens > 0 for one in found.values() for run in one.runs.values())
    assert max(found["psft"].runs[1].curves["clip_fraction"]) > 0
    assert found["sft"].runs[1].accuracy["in"] != []
    for claim in CLAIMS:
        assert claim.title in (work / "evidence.html").read_text()

    plan = subprocess.run(command(work, "--dry-run"), cwd=ROOT, capture_output=True, text=True)
    assert "about 0 core-seconds" in plan.stdout
