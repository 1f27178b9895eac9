"""What happens to nodes, steps and ranks in the middle of a run: it goes on elsewhere bit for bit, or ends and says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.command import megapsft
from tests.slurm.jobs import ranks_of
from tests.slurm.runs import PSFT, measured, options, submit
from tests.slurm.test_time_limit import SLOW

pytestmark = pytest.mark.slurm

STEPS, UPDATES = 8, 4
SPARE = "--option=--exclude=node5,node6"  # it starts on node1 and node2, and may go to node3 and node4


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PSFT that takes its time."""
    path = tmp_path_factory.mktemp("objective") / "slow.py"
    path.write_text(SLOW)
    return path


def given(tiny_models, tiny_data: Path, objective: Path, run: Path, *more: str) -> list[str]:
    return options(
        tiny_models("qwen3"), tiny_data, run, "parallel.tensor_model_parallel_size=2", f"objective.name={objective}",
        f"train.steps={STEPS}", "train.sft_warmup_steps=0", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_models, tiny_data, objective, tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """What a run writes down that nothing happens to, on one machine."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = megapsft("train", str(PSFT), *given(tiny_models, tiny_data, objective, run), SLOW_SECONDS="0")
    assert done.returncode == 0, done.stderr
    return measured(run)


@pytest.fixture
def slow_job(jobs, tiny_models, tiny_data, objective, tmp_path):
    """Submits it on two nodes; (job, its folder) once it has saved itself, and done more since."""

    def start(*more: str, ranks: int = 1) -> tuple[int, Path]:
        run = tmp_path / "run"
        of_run = given(tiny_models, tiny_data, objective, run, *more)
        of_job = ("cluster.environment={SLOW_SECONDS: '0.5'}", "cluster.preflight=false", f"cluster.ranks_per_node={ranks}")
        job = submit(jobs, str(PSFT), "--nodes", "2", SPARE, *of_job, *of_run)
        jobs.wait_for(lambda: (run / "checkpoints/latest").is_symlink() and updates(run) > 3 * UPDATES, job)
        assert jobs.show(job)["NodeList"] == "node[1-2]"
        return job, run

    return start


def updates(run: Path) -> int:
    """How many it has done."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def test_a_node_that_is_set_down_gives_the_run_back_and_it_goes_on_elsewhere(cluster, jobs, slow_job, undisturbed):
    job, run = slow_job()
    cluster.slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        assert updates(run) < STEPS * UPDATES
        shown = jobs.completes(job)
    finally:
        cluster.slurm("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert shown["Restarts"] == "1"
    assert "node2" not in cluster.slurm("scontrol", "show", "hostnames", shown["NodeList"]).split()
    assert measured(run) == undisturbed


def test_a_node_that_crashes_too(cluster, jobs, slow_job, undisturbed):
    job, run = slow_job()
    cluster.kill("node2")
    try:
        assert updates(run) < STEPS * UPDATES
        shown = jobs.completes(job)
    finally:
        cluster.start("node2")
    assert shown["Restarts"] == "1"
    assert "node2" not in cluster.slurm("scontrol", "show", "hostnames", shown["NodeList"]).split()
    assert measured(run) == undisturbed


def test_a_step_that_is_cancelled_ends_the_job_and_submitted_again_the_run_goes_on(cluster, jobs, slow_job, undisturbed):
    job, run = slow_job()
    steps = cluster.slurm("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job}").split()
    (step,) = (step for step in steps if step.split(".")[1].isdigit())
    cluster.slurm("scancel", step)
    shown = jobs.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0"), jobs.why(job)
    assert updates(run) < STEPS * UPDATES
    script = next((run / "slurm").glob("*.sbatch"))
    jobs.completes(jobs.sbatch(str(script)))
    assert measured(run) == undisturbed


def test_a_rank_that_is_stopped_is_found_and_the_stacks_of_the_others_are_in_the_log(cluster, jobs, slow_job):
    job, run = slow_job("train.hang_factor=3.0", "train.hang_seconds=5.0", ranks=2)
    stopped = ranks_of(cluster, "node2", job)[3]
    os.kill(stopped, signal.SIGSTOP)
    shown = jobs.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "70:0", "0"), jobs.why(job)
    assert updates(run) < STEPS * UPDATES
    log = jobs.log(job).read_text()
    for rank in range(3):  # it writes its own too, where Slurm lets it go on before it is killed
        assert f" rank {rank}, process " in log
    assert log.count("finish_grad_sync") + log.count("all_reduce") >= 3
    deadline = time.monotonic() + 30
    while Path(f"/proc/{stopped}").exists():  # Slurm ends what is left of a step when the job has its state already
        assert time.monotonic() < deadline
        time.sleep(0.1)
