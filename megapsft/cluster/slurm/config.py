"""What a cluster is to a job: the YAML of `megapsft submit --cluster`, the same for all runs on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from megapsft.config import STRICT, build, merge, parse_override, read_yaml
from megapsft.errors import Refused

TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OURS = {"--nodes", "--ntasks", "--ntasks-per-node", "--output", "--open-mode", "--signal", "--requeue", "--no-requeue"}
OURS |= {"--job-name", "--chdir", "--array", "-N", "-n", "-o", "-J", "-D", "-a"}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs are submitted on a cluster. `null` leaves a choice to Slurm."""

    __pydantic_config__ = STRICT
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"  # of a job; a run that takes longer is put back into the queue, and goes on
    gpus_per_node: NonNegativeInt = 8  # 0: nodes without GPUs
    gpu: str | None = None  # a100, h100, h200, b200: runs that do not fit are refused, as `megapsft plan` says
    ranks_per_node: PositiveInt | None = None  # default: one a GPU, or one
    cpus_per_task: PositiveInt | None = None
    mem: str | None = None  # of a node, such as 0 for all of it, or 200G
    exclusive: bool = True  # nobody else on the nodes
    signal_seconds: PositiveInt = 300  # before the time is over: they have to hold a step and a checkpoint
    mpi: str | None = None  # srun --mpi=...: none, pmix, pmi2, as the site has it
    python: str | None = None  # interpreter on the nodes; default: the one that submits, or python3 of the container
    sglang_python: str | None = None  # the one that has SGLang, where rollout.python does not say it
    container: str | None = None  # image for pyxis: srun --container-image
    mounts: tuple[str, ...] = ()  # into the container: from:to
    preflight: bool = True  # nodes are checked before a rank is started
    environment: dict[str, str] = field(default_factory=dict)  # of every process of a job, such as NCCL_SOCKET_IFNAME
    options: tuple[str, ...] = ()  # more options of sbatch, such as --mail-type=FAIL

    @property
    def interpreter(self) -> str:
        """Of every process of a job, where it runs."""
        return self.python or ("python3" if self.container else sys.executable)

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def step_options(self) -> list[str]:
        """Of every srun in a job."""
        options = [f"--mpi={self.mpi}"] if self.mpi else []
        if self.container:
            options += [f"--container-image={self.container}"]
            options += [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        return options


def load_cluster(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The YAML file, overlaid by `key=value`; defaults where there is none.

    Raises:
        Refused: unknown key (lists the known ones), value of another type, missing file; what would not be one word to Slurm.
    """
    tree = read_yaml(path) if path is not None else {}
    for override in overrides:
        key, _, value = override.partition("=")
        merge(tree, {key: value} if key == "time" else parse_override(override))
    if isinstance(tree.get("time"), int):  # YAML reads 4:00:00 as a number to the base of 60
        raise Refused(f"time={tree['time']}", "is a number to YAML", 'write it in quotes: time: "4:00:00"')
    cluster = build(ClusterConfig, tree)
    if not TIME.fullmatch(cluster.time):
        raise Refused(f"time={cluster.time}", "is not a time limit of Slurm", "write HH:MM:SS, D-HH:MM:SS or minutes")
    words = ("account", "partition", "qos", "reservation", "constraint", "mem", "mpi", "container")
    for name, word in [*((name, getattr(cluster, name)) for name in words), *(("mounts", mount) for mount in cluster.mounts)]:
        if word is not None and (not word or re.search(r"\s", word) or word.startswith("-")):
            raise Refused(f"{name}={word!r}", "is not one word", "leave it out, or write it without spaces")
    for option in cluster.options:
        if not option.startswith("-") or re.search(r"[\n\r#]", option):
            raise Refused(f"options: {option!r}", "is not an option of sbatch", "write --name=value")
        if re.split(r"[=\s]", option)[0] in OURS:
            raise Refused(f"options: {option}", "is set by megapsft submit", "leave it out")
    for name, value in cluster.environment.items():
        if not VARIABLE.fullmatch(name) or "\n" in value:
            remedy = "use letters, digits and _, and one line"
            raise Refused(f"environment: {name}={value!r}", "is no variable of a shell", remedy)
    if cluster.mounts and not cluster.container:
        rule = "are of a container, and there is none"
        raise Refused(f"mounts={list(cluster.mounts)}", rule, "name container, or leave them out")
    if cluster.ranks_per_node and cluster.gpus_per_node and cluster.ranks_per_node > cluster.gpus_per_node:
        rule = f"is more than gpus_per_node={cluster.gpus_per_node}"
        raise Refused(f"ranks_per_node={cluster.ranks_per_node}", rule, "leave it out: one rank a GPU")
    return cluster
