"""From a config and a cluster to a job: checked before it is queued, written down, and handed to Slurm."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from megapsft.cluster.estimate import estimate
from megapsft.cluster.hardware import Machines, gpu_named
from megapsft.cluster.model_folder import shape_of_model
from megapsft.cluster.preflight import packages
from megapsft.cluster.slurm import client, records
from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.cluster.slurm.nemo import through_nemo_run
from megapsft.cluster.slurm.records import Record
from megapsft.cluster.slurm.script import Script, lint
from megapsft.config import Config
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.output.places import check_folder
from megapsft.parallel import plan_mesh
from megapsft.platform.cpu import has_cuda
from megapsft.policy.build import model_shape
from megapsft.train.phases import phases
from megapsft.train.plan import plan_run, run_folder, to_yaml
from megapsft.train.profile import check_profiles
from megapsft.train.rollout_options import DEFAULTS, OF_SERVERS_STARTED, check_options
from megapsft.train.sources import load_dataset

Via = Literal["sbatch", "nemo-run"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job that may be submitted, and nothing written yet."""

    script: Script
    config: Config  # as it will be trained, whatever becomes of its file
    stamp: str  # names its files under RUN/slurm
    notes: tuple[str, ...] = ()  # what could not be checked here

    @property
    def folder(self) -> Path:
        return records.folder(run_folder(self.config).absolute())

    @property
    def config_file(self) -> Path:
        return self.folder / f"{self.stamp}.yaml"

    @property
    def script_file(self) -> Path:
        return self.folder / f"{self.stamp}.sbatch"


def prepare(
    config_file: Path,
    config: Config,
    cluster: ClusterConfig,
    *,
    nodes: int,
    rollout_nodes: int = 0,
    export: Path | None = None,
    after: Sequence[str] = (),
    options: Sequence[str] = (),
    checked: Config | None = None,
) -> Prepared:
    """Check a run as far as this machine can, and make the script of its job.

    Args:
        config_file: where the config comes from; the shapes of models are looked for beside it.
        nodes: of the trainers.
        rollout_nodes: more nodes, for SGLang servers alone.
        export: folder for the model, once it is trained.
        after: numbers of jobs that have to succeed before.
        options: more options of sbatch.
        checked: what is checked in place of the config, where models that it names are yet to be made.

    Raises:
        Refused: a split that does not fit the model, the nodes or the memory of their GPUs; servers that do not fit; what
            `plan_run` refuses, where model and data are on this machine.
    """
    if nodes < 1:
        raise Refused(f"--nodes {nodes}", "must be 1 or more", "use 1 or more")
    if rollout_nodes < 0:
        raise Refused(f"--rollout-nodes {rollout_nodes}", "must be 0 or more", "leave it out for none")
    if not config.run.dir:
        raise Refused("run.dir=''", "names no folder", "give one such as runs/first")
    if not config.model.path:
        raise Refused("model.path=''", "names no model", "give a Hugging Face folder")
    if cluster.sglang_python and config.rollout.engine == "sglang" and config.rollout.python is None:
        config = replace(config, rollout=replace(config.rollout, python=cluster.sglang_python))
    _check_servers(config, cluster, nodes, rollout_nodes)
    notes = _check_run(config_file, checked or config, cluster, nodes)
    run = run_folder(config).absolute()
    script = Script(
        cluster=cluster, name=f"megapsft-{run.name}", function="train", arguments=(), run=run, nodes=nodes,
        rollout_nodes=rollout_nodes, export=export, after=tuple(after), options=tuple(options),
    )  # fmt: skip
    prepared = Prepared(script=script, config=config, stamp=new_stamp(), notes=tuple(notes))
    return replace(prepared, script=replace(script, arguments=(str(prepared.config_file),)))


def new_stamp() -> str:
    """For the names of files under RUN/slurm."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _check_run(config_file: Path, config: Config, cluster: ClusterConfig, nodes: int) -> list[str]:
    world, on_gpus = nodes * cluster.tasks_per_node, cluster.gpus_per_node > 0
    check_profiles(config.profile)
    check_folder(f"run.dir={config.run.dir}", Path(config.run.dir))
    try:
        hf = shape_of_model(config_file, config.model.path)
    except Refused as error:
        if Path(config.model.path).exists():
            raise
        return [f"{error.value} {error.rule}: split and memory are not checked before the job starts"]
    plan_mesh(config.parallel, world, model_shape(hf), on_gpus, config.model.moe_token_dispatcher_type)
    if on_gpus and cluster.gpu is not None:
        found = estimate(config, hf, Machines(gpu=gpu_named(cluster.gpu), nodes=nodes, gpus_per_node=cluster.tasks_per_node))
        if not found.fits:
            rule = f"needs {found.peak / 2**30:.0f} GiB of a GPU's {found.usable / 2**30:.0f} on {nodes} nodes of {cluster.gpu}"
            raise Refused(str(config_file), rule, "`megapsft plan` says where they go, and which splits fit")
    missing = [path for path in (config.model.path, config.data.path) if not path or not Path(path).exists()]
    if on_gpus and not has_cuda():
        phases(config)
        check_options(_as_on_gpus(config))
        if config.data.cache is None or missing:
            return ["model and data are checked when the job starts: there is no GPU here"]
        load_dataset(config, ChatTemplate.load(config.model.path), hf.vocab_size)  # its GPUs need not wait for this
        return ["the model is checked when the job starts: there is no GPU here"]
    if missing:
        return [f"{', '.join(path or 'data.path' for path in missing)} is not on this machine: checked when the job starts"]
    plan_run(config, world)
    return []


def _as_on_gpus(config: Config) -> Config:
    """Its rollouts as they can be checked where there is no GPU, and no SGLang."""
    rollout = replace(config.rollout, fp8=False)
    if rollout.engine == "sglang" and not rollout.urls:
        started = {key: getattr(DEFAULTS, key) for key in OF_SERVERS_STARTED}
        rollout = replace(rollout, urls=("http://elsewhere",), **started)
    return replace(config, rollout=rollout)


def has_servers(config: Config) -> bool:
    """Whether SGLang servers are to be started for the run's rollouts."""
    return config.data.kind == "prompts" and config.rollout.engine == "sglang" and not config.rollout.urls


def _check_servers(config: Config, cluster: ClusterConfig, nodes: int, rollout_nodes: int) -> None:
    rollout, given = config.rollout, f"--rollout-nodes {rollout_nodes}"
    served = has_servers(config)
    if rollout_nodes and not served:
        rule = "are for SGLang servers, and this run starts none"
        raise Refused(given, rule, "set rollout.engine=sglang without rollout.urls, or leave it out")
    if not served or (nodes == 1 and not rollout_nodes):  # it starts them itself, on its own machine
        return
    if rollout.fp8:
        rule = "is of servers that the run starts itself, and these are steps of the job"
        raise Refused("rollout.fp8=true", rule, "leave it out, or use one node")
    wanted = rollout.servers * rollout.tensor_parallel_size
    if cluster.gpus_per_node and wanted > cluster.gpus_per_node:
        rule = f"of {rollout.tensor_parallel_size} GPUs are more than gpus_per_node={cluster.gpus_per_node}"
        raise Refused(f"rollout.servers={rollout.servers}", rule, "use fewer on each node, or a smaller tensor_parallel_size")


def submit(prepared: Prepared, via: Via = "sbatch") -> str:
    """Write down the config as it is now, and submit the job; its number.

    Raises:
        Refused: a job of the same run that is not over; as `send`.
    """
    check_alone(prepared.script.run)
    _write(prepared)
    return send(prepared.script, prepared.script_file, via)


def _write(prepared: Prepared) -> None:
    """RUN/slurm: the config as it is now, and where the nodes use this very interpreter, what is installed."""
    prepared.folder.mkdir(parents=True, exist_ok=True)
    prepared.config_file.write_text(to_yaml(prepared.config))
    if prepared.script.cluster.container is None and prepared.script.environment["MEGAPSFT_PYTHON"] == sys.executable:
        packages.record(prepared.folder)


def send(script: Script, file: Path, via: Via = "sbatch") -> str:
    """Hand a job to sbatch, or to nemo-run, which writes a script of its own; its number, which its run writes down.

    Raises:
        Refused: what the checks of scripts find; no nemo-run; what sbatch refuses.
    """
    text = script.render()
    lint(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    if via == "nemo-run":
        answer = through_nemo_run(script)
        text, number = answer.script, answer.number
        file.write_text(text)
    else:
        file.write_text(text)
        number = client.submit(file)
    log = str(script.log).replace("%j", number)
    records.append(script.run, Record(job=number, name=script.name, submitted=records.now(), script=str(file), log=log))
    return number


def check_alone(run: Path) -> None:
    """Refuse where a job of the same run is not over."""
    if not (records.folder(run) / records.FILE).is_file():
        return
    last = records.read(run)[-1]
    job = client.find(last.job)
    if not job.over and job.name == last.name:
        raise Refused(f"job {job.id}", f"is {job.state}, and of the same run.dir", f"wait for it, or megapsft cancel {run}")
