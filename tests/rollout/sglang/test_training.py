"""A run through servers that fail and a verifier that never returns trains what it would have trained without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft.data.arithmetic import generate, write_jsonl
from tests.command import megapsft
from tests.rollout.sglang.servers import Proxy
from tests.shipped import FOLDER

pytestmark = pytest.mark.servers

STEPS, GROUPS, N = 4, 4, 2
REWARD = """\
import time

def reward(prompt, response, row):
    while {never} and row["index"] % 5 == 1:
        time.sleep(1)
    return 0.0
"""
FAULTS = (500, "cut", "cut after", {"weight_version": "0", "weight_versions": []}, 0.5)


def fault(path, count, body):
    """One call after the other something else, and one that is not answered in time."""
    if path != "/generate":
        return None
    return 20.0 if count == 6 else (None, *FAULTS)[count % (len(FAULTS) + 1)]


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, [row | {"index": index} for index, row in enumerate(generate(STEPS * GROUPS, 3, "easy"))])
    return path


def test_the_samples_are_those_of_an_undisturbed_run(two_urls, dense, problems, tmp_path):
    """Tokens are the most probable ones, so that the weights alone say what is sampled, and best of n, so that they change."""

    def run(name: str, urls: list[str], never: bool) -> tuple[list[dict], list[tuple]]:
        reward = tmp_path / name / "reward.py"
        reward.parent.mkdir()
        reward.write_text(REWARD.format(never=never))
        done = megapsft(
            "train", str(FOLDER / "rft/tiny-qwen3-arithmetic-dft.yaml"), f"model.path={dense}", f"data.path={problems}",
            f"run.dir={tmp_path / name / 'run'}", f"train.steps={STEPS}", f"train.batch_size={GROUPS}", "train.minibatch_size=2",
            "train.sft_warmup_steps=0", "objective.name=sft", "data.select=raft", "optimizer.lr=3e-3", "log.rollouts=1",
            f"rewards=[{{name: {reward}, timeout: 1.0}}]", "rollout.engine=sglang", f"rollout.urls=[{', '.join(urls)}]",
            f"rollout.n={N}", "rollout.top_k=1", "rollout.max_tokens=12", "rollout.request_timeout=10",
            "rollout.health_interval=1", "log.progress=false", "log.tensorboard=false",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        steps = [json.loads(line) for line in (tmp_path / name / "run/steps.jsonl").read_text().splitlines()]
        return steps, samples(tmp_path / name / "run/rollouts")

    undisturbed, expected = run("undisturbed", [two_urls[1]], never=False)
    proxy = Proxy(two_urls[0], fault)
    with proxy.listening() as url:
        disturbed, found = run("disturbed", [url, two_urls[1]], never=True)
    assert proxy.calls["/generate"] > len(FAULTS)
    assert sum(step["reward/timeouts"] for step in undisturbed) == 0
    assert sum(step["reward/timeouts"] for step in disturbed) == N * len(range(1, STEPS * GROUPS, 5))
    assert len(found) == STEPS * GROUPS * N
    assert len({draw for _, draw, _ in found}) == STEPS * GROUPS
    assert found == expected
    assert len({ids for *_, ids in found}) > 4  # the weights have changed
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one["objective/nll"] == pytest.approx(other["objective/nll"], rel=1e-5)


def samples(folder: Path) -> list[tuple]:
    """(step, draw, token ids) of every rollout, sorted."""
    return sorted(
        (path.stem, record["draw"], tuple(rollout["token_ids"]))
        for path in folder.iterdir()
        for record in map(json.loads, path.read_text().splitlines())
        for rollout in record["rollouts"]
    )
