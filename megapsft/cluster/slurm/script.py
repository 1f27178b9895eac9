"""The batch script of a job: what launchers/slurm/train.sbatch says, with the header of a cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.errors import Refused

HOME = Path(__file__).resolve().parents[3]  # the clone
LAUNCHERS = HOME / "launchers" / "slurm"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A job to be: one of the functions of launchers/slurm/job.sh, and its arguments."""

    cluster: ClusterConfig
    name: str
    function: Literal["train", "run"]
    arguments: tuple[str, ...]
    run: Path  # the folder that its logs lie in
    nodes: int = 1
    rollout_nodes: int = 0  # more of them, for SGLang servers alone
    export: Path | None = None  # where the model is written once it is trained
    after: tuple[str, ...] = ()  # jobs that have to succeed before
    options: tuple[str, ...] = ()  # more of sbatch, after those of the cluster

    @property
    def log(self) -> Path:
        """Of the batch shell; %j is the job's number."""
        return self.run / "slurm" / "%j.log"

    @property
    def header(self) -> list[str]:
        """The options of sbatch for the trainers' nodes, the shared ones first."""
        cluster = self.cluster
        shared = [f"--job-name={self.name}", f"--time={cluster.time}", f"--signal=USR1@{cluster.signal_seconds}", "--requeue"]
        shared += ["--open-mode=append", f"--output={self.log}", f"--chdir={Path.cwd()}"]
        if self.after:
            shared += [f"--dependency=afterok:{':'.join(self.after)}", "--kill-on-invalid-dep=yes"]
        return shared + self._of_nodes(self.nodes, cluster.tasks_per_node if self.function == "train" else 1)

    @property
    def rollout_header(self) -> list[str]:
        """Those for the nodes of the servers, in a heterogeneous job."""
        return [f"--time={self.cluster.time}", *self._of_nodes(self.rollout_nodes, 1)] if self.rollout_nodes else []

    def _of_nodes(self, nodes: int, tasks: int) -> list[str]:
        cluster = self.cluster
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
        if cluster.gpus_per_node:
            options.append(f"--gpus-per-node={cluster.gpus_per_node if self.function == 'train' else 1}")
        for name in ("account", "partition", "qos", "reservation", "constraint", "mem", "cpus_per_task"):
            value = getattr(cluster, name)
            if value is not None:
                options.append(f"--{name.replace('_', '-')}={value}")
        if cluster.exclusive:
            options.append("--exclusive")
        return [*options, *cluster.options, *self.options]

    @property
    def environment(self) -> dict[str, str]:
        """What launchers/slurm/job.sh reads, and what the cluster's file adds for every process."""
        cluster = self.cluster
        told = {
            "MEGAPSFT_HOME": str(HOME),
            "MEGAPSFT_PYTHON": cluster.interpreter,
            "MEGAPSFT_SRUN": " ".join(cluster.step_options) or None,
            "MEGAPSFT_PREFLIGHT": None if cluster.preflight else "0",
            "MEGAPSFT_EXPORT": str(self.export.absolute()) if self.export else None,
            "MEGAPSFT_RUN": str(self.run.absolute()) if self.function == "run" else None,
        }
        return {name: value for name, value in told.items() if value is not None} | cluster.environment

    def render(self) -> str:
        """The file for sbatch."""
        for option in (*self.header, *self.rollout_header):
            if "\n" in option:
                raise Refused(repr(option), "is more than one line", "rename the folder, or correct the cluster's file")
        lines = ["#!/bin/bash", *(f"#SBATCH {_quoted(option)}" for option in self.header)]
        if self.rollout_nodes:
            lines += ["#SBATCH hetjob", *(f"#SBATCH {_quoted(option)}" for option in self.rollout_header)]
        lines += ["", *(f"export {name}={shlex.quote(value)}" for name, value in self.environment.items())]
        lines += ["", 'source "$MEGAPSFT_HOME/launchers/slurm/job.sh"']
        return "\n".join([*lines, shlex.join([self.function, *self.arguments]), ""])


def _quoted(option: str) -> str:
    """For a line of #SBATCH, which is split at spaces as a shell would."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if any(letter.isspace() for letter in value) else option


def lint(script: str) -> list[str]:
    """Which programs found the script right: bash, and shellcheck where it is.

    Raises:
        Refused: one of them found something, in its words.
    """
    used = []
    for command in (["bash", "-n"], ["shellcheck", "--severity=warning", "--exclude=SC1091", "-"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(command, input=script, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if done.returncode:
            said = f"{command[0]} says: {done.stdout}{done.stderr}".strip()
            raise Refused("the rendered script", said, "correct what stands in the cluster's file, or report it")
        used.append(command[0])
    return used
