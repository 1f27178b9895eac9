"""Submission through nemo-run's Slurm executor: the job that `Script` describes, in a script that nemo-run writes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapsft.cluster.slurm import records
from megapsft.cluster.slurm.script import Script
from megapsft.errors import Refused
from megapsft.platform.interpreter import Elsewhere

JOB = Path(__file__).with_name("nemo_job.py")
NEMO_RUN = Elsewhere(
    name="nemo-run", module="nemo_run", target="nemo-run", variable="MEGAPSFT_NEMO_RUN_PYTHON", wanted="--via nemo-run"
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What nemo-run made of a job."""

    script: str
    number: str | None  # None: it was not submitted


def through_nemo_run(script: Script, *, dry_run: bool = False) -> Answer:
    """The script that nemo-run writes for a job, which is submitted unless `dry_run`.

    The header and the environment are those of `script`; the batch shell sources launchers/slurm/job.sh and readies the run, one
    srun of nemo-run starts the ranks, and what job.sh leaves behind as a trap ends the job or puts it back into the queue.

    What nemo-run keeps of its experiments is under RUN/slurm/nemo-run, or where NEMORUN_HOME says.

    Raises:
        Refused: nemo-run is not installed; nodes for servers alone, or an option without its long name; what nemo-run or sbatch
            refuse, with the last lines.
    """
    python, job = NEMO_RUN.find_python(), {**_job(script), "dry_run": dry_run}
    kept = Path(os.environ.get("NEMORUN_HOME") or records.folder(script.run) / "nemo-run").absolute()
    with tempfile.TemporaryDirectory() as folder:
        source, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        source.write_text(json.dumps(job))
        home = Path(folder) / "home" if dry_run else kept
        environment = {**os.environ, "NEMORUN_HOME": str(home)}
        command = [str(python), str(JOB), str(source), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode or not answer.is_file():
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise Refused("--via nemo-run", f"ended with exit code {done.returncode}:\n{said}", "use --via sbatch")
        told = json.loads(answer.read_text())
    return Answer(script=told["script"].replace(str(home), str(kept)), number=told["number"])


def _job(script: Script) -> dict[str, Any]:
    """What nemo_job.py reads."""
    if script.rollout_nodes:
        rule = "make a heterogeneous job, all of whose parts nemo-run would start at once"
        raise Refused(f"--rollout-nodes {script.rollout_nodes}", rule, "use --via sbatch")
    options = dict(map(_option, script.header))
    config = shlex.join(script.arguments)
    environment = [f"export {name}={shlex.quote(value)}" for name, value in script.environment.items()]
    srun = [*script.cluster.step_options, f"--chdir={options['chdir']}"]  # nemo-run's is an empty folder of its own
    if script.cluster.cpus_per_task:
        srun.append(f"--cpus-per-task={script.cluster.cpus_per_task}")
    return {
        "name": script.name,
        "options": options,
        "setup": "\n".join(["set +evx", *environment, 'source "$MEGAPSFT_HOME/launchers/slurm/job.sh"', f"ready {config}"]),
        "srun": [*map(shlex.quote, srun), '--output="$ATTEMPT/rank-%t.log"'],
        "command": ["bash", '"$MEGAPSFT_HOME/launchers/slurm/rank.sh"', "train", config, '"${OVERRIDES[@]}"'],
    }


def _option(text: str) -> tuple[str, str | bool]:
    """`--name=value` or `--name`."""
    name, equals, value = text.partition("=")
    if not name.startswith("--") or any(letter.isspace() for letter in name):
        raise Refused(text, "is not --name=value, as nemo-run has options", "write it so, or use --via sbatch")
    return name.removeprefix("--"), value if equals else True
