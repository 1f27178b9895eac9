"""A run through servers that fail, die and hang, and a verifier that never returns, trains what it would have without them.

Tokens are the most probable ones, so that the weights alone say what is sampled, and best of n is trained, so that they change.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.rollout.sglang.client import Client, Unanswered
from megapsft.rollout.sglang.server import SERVE
from tests.command import megapsft, megapsft_started
from tests.rollout.sglang.servers import Proxy
from tests.shipped import FOLDER

pytestmark = pytest.mark.servers

STEPS, GROUPS, N = 4, 4, 2
REWARD = """\
import os
import time

def reward(prompt, response, row):
    while {waits}:
        time.sleep(0.1)
    return 0.0
"""
FAULTS = (500, "cut", "cut after", {"weight_version": "0", "weight_versions": []}, 0.5)


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    """In the order in which they are trained: problem `index` is of step index // GROUPS."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_jsonl(path, [row | {"index": index} for index, row in enumerate(generate(STEPS * GROUPS, 3, "easy"))])
    return path


@pytest.fixture(scope="module")
def undisturbed(two_urls, dense, problems, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = megapsft(*training(dense, problems, folder, f"rollout.urls=[{two_urls[1]}]"))
    assert done.returncode == 0, done.stderr
    found = outcome(folder)
    assert len(found.samples) == STEPS * GROUPS * N
    assert len({draw for _, draw, _ in found.samples}) == STEPS * GROUPS
    assert len({ids for *_, ids in found.samples}) > 4  # the weights have changed
    assert sum(step["reward/timeouts"] for step in found.steps) == 0
    return found


def training(model: Path, problems: Path, folder: Path, *more: str, waits: str = "False", timeout: float = 1.0) -> list[str]:
    reward = folder / "reward.py"
    reward.write_text(REWARD.format(waits=waits))
    return [
        "train", str(FOLDER / "rft/tiny-qwen3-arithmetic-dft.yaml"), f"model.path={model}", f"data.path={problems}",
        "data.shuffle=false", f"run.dir={folder / 'run'}", f"train.steps={STEPS}", f"train.batch_size={GROUPS}",
        "train.minibatch_size=2", "train.sft_warmup_steps=0", "objective.name=sft", "data.select=raft", "optimizer.lr=3e-3",
        "log.rollouts=1", f"rewards=[{{name: {reward}, timeout: {timeout}}}]", "rollout.engine=sglang", f"rollout.n={N}",
        "rollout.top_k=1", "rollout.max_tokens=64", "rollout.requests_per_server=2", "rollout.request_timeout=10",
        "rollout.health_interval=1", "log.progress=false", "log.tensorboard=false", *more,
    ]  # fmt: skip


def outcome(folder: Path) -> SimpleNamespace:
    """The records of the steps, and (step, draw, token ids) of every rollout, sorted."""
    samples = sorted(
        (path.stem, record["draw"], tuple(rollout["token_ids"]))
        for path in (folder / "run/rollouts").iterdir()
        for record in map(json.loads, path.read_text().splitlines())
        for rollout in record["rollouts"]
    )
    return SimpleNamespace(steps=list(map(json.loads, (folder / "run/steps.jsonl").read_text().splitlines())), samples=samples)


def assert_the_same(found: SimpleNamespace, expected: SimpleNamespace) -> None:
    assert found.samples == expected.samples
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one["objective/nll"] == pytest.approx(other["objective/nll"], rel=1e-5)


def fault(path, count, body):
    """One call after the other something else, and one that is not answered in time."""
    if path != "/generate":
        return None
    return 20.0 if count == 6 else (None, *FAULTS)[count % (len(FAULTS) + 1)]


def test_a_server_that_fails_and_a_verifier_that_never_returns(undisturbed, two_urls, dense, problems, tmp_path):
    proxy = Proxy(two_urls[0], fault)
    with proxy.listening() as url:
        urls = f"rollout.urls=[{url}, {two_urls[1]}]"
        done = megapsft(*training(dense, problems, tmp_path, urls, waits='row["index"] % 5 == 1'))
    assert done.returncode == 0, done.stderr
    assert proxy.calls["/generate"] > len(FAULTS)
    found = outcome(tmp_path)
    assert sum(step["reward/timeouts"] for step in found.steps) == N * len(range(1, STEPS * GROUPS, 5))
    assert_the_same(found, undisturbed)


def test_servers_that_are_killed_and_hang(undisturbed, dense, problems, tmp_path):
    """Of the run's own two one is killed while it answers, and while it starts again the other one hangs; both come back.

    They start without weights, as with FP8: all that they ever have are those of updates. The last step waits for both.
    """
    gate, log = tmp_path / "gate", tmp_path / "train.log"
    waits = f'row["index"] // {GROUPS} == {STEPS - 2} and not os.path.exists({str(gate)!r})'
    own = ("rollout.servers=2", "rollout.server_args=[--load-format, dummy]")
    with megapsft_started(*training(dense, problems, tmp_path, *own, waits=waits, timeout=240.0), log=log) as run:

        def wait_for(true, seconds=240):
            deadline = time.monotonic() + seconds
            while not true():
                assert run.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)

        wait_for(lambda: any(map(answers, servers_of(run.pid))))
        first, second = sorted(servers_of(run.pid), key=answers, reverse=True)
        everything = with_children(first, second)
        next(process for process in everything if process.name() == "sglang::scheduler").kill()
        wait_for((tmp_path / "run/steps.jsonl").is_file)
        wait_for(lambda: answers(second))
        for process in with_children(second):
            process.suspend()
        wait_for(lambda: [version(server) for server in servers_of(run.pid)] == [str(STEPS - 2)] * 2)
        again = with_children(*servers_of(run.pid))
        for connection in (connection for process in again for connection in process.net_connections("tcp")):
            assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip == "127.0.0.1"
        gate.touch()
        assert run.wait(240) == 0, log.read_text()
    gone, alive = psutil.wait_procs([*everything, *again], timeout=20)
    assert not alive
    assert len(gone) >= 12  # four times a server, its scheduler and its detokenizer
    assert log.read_text().count("is taken out") == 2
    assert_the_same(outcome(tmp_path), undisturbed)


def servers_of(pid: int) -> list[psutil.Process]:
    """Of a run: those of its processes that are in the middle of `serve.py`, not what one of them forks and is yet to become."""
    found = {child: parent_of(child) for child in psutil.Process(pid).children(recursive=True) if str(SERVE) in command_of(child)}
    pids = {child.pid for child in found}
    return [child for child, parent in found.items() if parent is not None and parent not in pids]


def parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:  # it ended in between
        return None


def with_children(*processes: psutil.Process) -> list[psutil.Process]:
    return [one for process in processes for one in (process, *process.children(recursive=True))]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended in between
        return []


def url_of(server: psutil.Process) -> str | None:
    """None where it has ended by now."""
    command = command_of(server)
    return f"http://127.0.0.1:{command[command.index('--port') + 1]}" if "--port" in command else None


def answers(server: psutil.Process) -> bool:
    """Whether it has two requests at once, of which a check of its health may be one."""
    url = url_of(server)
    try:
        loads = httpx.get(f"{url}/v1/loads", trust_env=False).json()["loads"] if url else []
    except httpx.HTTPError:  # it starts
        return False
    return sum(load["num_running_reqs"] for load in loads) >= 2


def version(server: psutil.Process) -> str | None:
    url = url_of(server)
    try:
        return Client(url).about(5).weight_version if url else None
    except Unanswered:
        return None
