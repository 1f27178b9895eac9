"""A pipeline as jobs of Slurm: one for each stage, after the one before, and a last one that compares the models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.cluster.slurm import client, records
from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.cluster.slurm.script import Script
from megapsft.cluster.slurm.submit import Prepared, Via, check_alone, has_servers, new_stamp, prepare, send, submit
from megapsft.config import Config, RunConfig
from megapsft.errors import Refused
from megapsft.pipeline.config import PipelineConfig, stage_config
from megapsft.pipeline.plan import with_first_model

COMPARE = "compare"  # the last job


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Jobs that may be submitted, and nothing written yet."""

    pipeline: PipelineConfig  # whose stages have the configs that are submitted
    stages: Mapping[str, Prepared]  # those that are not done yet, in their order
    compare: Script | None  # where something is compared
    after: tuple[str, ...]  # jobs that have to succeed before

    @property
    def folder(self) -> Path:
        return Path(self.pipeline.run.dir).absolute()

    @property
    def notes(self) -> list[str]:
        """What could not be checked here."""
        return [f"stage {name}: {note}" for name, one in self.stages.items() for note in one.notes]

    @property
    def scripts(self) -> dict[str, Script]:
        """Of each job, in their order; the numbers of those before stand in them once they are submitted."""
        found = {name: one.script for name, one in self.stages.items()} | ({COMPARE: self.compare} if self.compare else {})
        names = list(found)
        after = [self.after, *((f"number-of-{name}",) for name in names)]
        return {name: replace(found[name], after=numbers) for name, numbers in zip(names, after, strict=False)}


def prepare_chain(
    pipeline: PipelineConfig,
    cluster: ClusterConfig,
    *,
    nodes: int,
    rollout_nodes: int = 0,
    after: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Chain:
    """Check every stage that is not done, as far as this machine can, and make the scripts of the jobs.

    Args:
        nodes: of the trainers of each stage.
        rollout_nodes: more nodes, for SGLang servers alone, of stages that have some.
        after: numbers of jobs that have to succeed before the first stage.
        options: more options of sbatch, for every job.

    Raises:
        Refused: whatever is wrong with a stage, with its name, as `prepare`; a pipeline with nothing left to do.
    """
    if not pipeline.run.dir:
        raise Refused("run.dir=''", "names no folder", "give one such as runs/psft-grpo")
    stages, given = {}, []
    for number, stage in enumerate(pipeline.stages):
        export = pipeline.export(stage.name)
        if (export / MANIFEST).is_file():
            given.append(stage)
            continue
        config = stage_config(pipeline, number)
        try:
            prepared = prepare(
                Path(stage.config), config, cluster, nodes=nodes, rollout_nodes=rollout_nodes if has_servers(config) else 0,
                export=export, options=options, checked=_checked(pipeline, number, config),
            )  # fmt: skip
        except Refused as error:
            raise Refused(f"stage {stage.name}: {error.value}", error.rule, error.remedy) from None
        name = f"megapsft-{Path(pipeline.run.dir).name}-{stage.name}"
        stages[stage.name] = replace(prepared, script=replace(prepared.script, name=name))
        given.append(replace(stage, config=str(prepared.config_file), set={}))
    compare = _compare(pipeline, cluster, options) if pipeline.compare.data else None
    if not stages and not compare:
        raise Refused(pipeline.run.dir, "is done, and compare.data names no file", "give another run.dir to begin anew")
    return Chain(pipeline=replace(pipeline, stages=tuple(given)), stages=stages, compare=compare, after=tuple(after))


def _checked(pipeline: PipelineConfig, number: int, config: Config) -> Config | None:
    """The config with the first model for those that earlier stages have yet to make; None where all are there."""
    earlier = {str(pipeline.export(before.name)) for before in pipeline.stages[:number]}
    to_come = {path for path in earlier if not Path(path).is_dir()}
    if config.model.path not in to_come:
        return None
    return with_first_model(replace(config, run=RunConfig(dir=f"{config.run.dir}/checked")), to_come, pipeline.model)


def _compare(pipeline: PipelineConfig, cluster: ClusterConfig, options: Sequence[str]) -> Script:
    """`megapsft pipeline`, which finds all stages done."""
    folder = Path(pipeline.run.dir).absolute()
    return Script(
        cluster=cluster, name=f"megapsft-{folder.name}", function="run", run=folder, options=tuple(options),
        arguments=("pipeline", str(records.folder(folder) / f"{new_stamp()}.yaml")),
    )  # fmt: skip


def submit_chain(chain: Chain, via: Via = "sbatch") -> dict[str, str]:
    """Submit the jobs; their numbers, by stage. The comparison is always sbatch's.

    RUN/slurm/jobs.jsonl has them all, so that `megapsft status RUN` and `cancel RUN` are of the whole chain, and each stage's
    its own.

    Raises:
        Refused: a job of a stage that is not over; as `submit`. What was submitted before is cancelled then.
    """
    for run in (chain.folder, *(one.script.run for one in chain.stages.values())):
        check_alone(run)
    numbers: dict[str, str] = {}
    after = chain.after
    try:
        for name, prepared in chain.stages.items():
            script = replace(prepared.script, after=after)
            numbers[name] = submit(replace(prepared, script=script), via)
            records.append(chain.folder, records.read(script.run)[-1])
            after = (numbers[name],)
        if chain.compare is not None:
            file = Path(chain.compare.arguments[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(chain.pipeline))), sort_keys=False))
            numbers[COMPARE] = send(replace(chain.compare, after=after), file.with_suffix(".sbatch"))
    except Refused:
        if numbers:
            client.cancel(list(numbers.values()))
        raise
    return numbers
