"""Everything about a pipeline that can be known before its first stage: checked here, printed by --dry-run, then carried out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.config import Config, CriticConfig, ModelConfig, ReferenceConfig, RunConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import load_benchmark
from megapsft.evaluate.evaluation import Task, check_tasks, plan_task
from megapsft.output.places import check_folder
from megapsft.parallel import smallest_world
from megapsft.pipeline.config import PipelineConfig, stage_config
from megapsft.report.picture import need_matplotlib
from megapsft.rewards.registry import build_reward
from megapsft.train.plan import RunPlan, plan_run


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    config: Config
    model: Path  # that it starts from
    export: Path  # the Hugging Face folder that it makes
    done: bool
    begun: bool
    checked: bool  # with the very model that it starts from, and what was trained from it

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def state(self) -> str:
        if self.done:
            return "done"
        return "to be continued" if self.begun else "to be trained"

    @property
    def config_file(self) -> Path:
        """The resolved config, beside the run."""
        return self.folder.with_name(f"{self.name}.yaml")


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    config: PipelineConfig
    stages: tuple[Stage, ...]
    template: ChatTemplate
    tasks: tuple[Task, ...]  # of the comparison

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def rewards(self) -> tuple[dict[str, Any], ...]:
        return ({"name": self.config.compare.reward},)


def plan_pipeline(pipeline: PipelineConfig) -> PipelinePlan:
    """Check everything that can be checked before a stage is trained.

    A stage whose model is not there yet is checked with the first one in its place, which has the same shape and tokenizer.

    Raises:
        Refused: whatever is wrong with a stage, with its name; a stage that is done and whose config is another one now; what
            `load_benchmark` and `plan_task` refuse.
    """
    if not pipeline.run.dir:
        raise Refused("run.dir=''", "names no folder", "give one such as runs/psft-grpo")
    check_folder(f"run.dir={pipeline.run.dir}", Path(pipeline.run.dir))
    stages = []
    for number, stage in enumerate(pipeline.stages):
        try:
            stages.append(plan_stage(pipeline, number))
        except Refused as error:
            named = error.value if error.value.startswith(f"{stage.name}.") else f"stage {stage.name}: {error.value}"
            raise Refused(named, error.rule, error.remedy) from None
    template = ChatTemplate.load(pipeline.model)
    return PipelinePlan(config=pipeline, stages=tuple(stages), template=template, tasks=_tasks(pipeline, template))


def plan_stage(pipeline: PipelineConfig, number: int) -> Stage:
    """One of them, checked as far as the models are there."""
    config = stage_config(pipeline, number)
    name = pipeline.stages[number].name
    earlier = [str(pipeline.export(before.name)) for before in pipeline.stages[:number]]
    to_come = {path for path in earlier if not Path(path).is_dir()}
    stage = Stage(
        name=name,
        config=config,
        model=Path(config.model.path),
        export=pipeline.export(name),
        done=(pipeline.export(name) / MANIFEST).is_file(),  # the folder has its name once it is whole
        begun=(Path(config.run.dir) / "config.yaml").is_file(),
        checked=config.model.path not in to_come,
    )
    if not stage.checked:  # whatever stands in the run's folder is another run than this one
        config = dataclasses.replace(config, run=RunConfig(dir=str(stage.folder / "checked")))
    plan = plan_run(with_first_model(config, to_come, pipeline.model), _world(config))
    if stage.done and stage.checked:
        _check_done(stage, plan)
    return stage


def _check_done(stage: Stage, plan: RunPlan) -> None:
    """Refuse an export of other training; `plan_run` has compared what else there is to a config."""
    if plan.checkpoint is None:
        rule = "is there without the checkpoint that it was made of"
        raise Refused(str(stage.export), rule, f"put it back, or remove {stage.folder} to train the stage anew")
    if plan.done_steps != plan.steps:
        rule = f"makes {plan.steps} steps, and the stage is done with {plan.done_steps}"
        raise Refused(f"train.steps={stage.config.train.steps}", rule, "give the old value, or use another run.dir")


def with_first_model(config: Config, to_come: set[str], model: str) -> Config:
    """The config with the first model for those that are not there yet."""

    def there(section: ModelConfig | ReferenceConfig | CriticConfig) -> Any:
        return dataclasses.replace(section, path=model) if section.path in to_come else section

    sections = {name: there(getattr(config, name)) for name in ("model", "reference", "critic")}
    return dataclasses.replace(config, **sections)


def _world(config: Config) -> int:
    """Processes that `megapsft train` will start."""
    return max(smallest_world(config.parallel), torch.cuda.device_count())


def _tasks(pipeline: PipelineConfig, template: ChatTemplate) -> tuple[Task, ...]:
    options, model = pipeline.compare, Path(pipeline.model)
    if not options.data:
        return ()
    need_matplotlib("compare", without="leave compare out")
    rewards = [{"name": options.reward}]
    _, reward = build_reward(rewards[0])
    tasks = []
    for path in options.data:
        benchmark = load_benchmark(path, template, limit=options.limit, needs_reference=reward.needs_reference)
        given = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_tokens}
        tasks.append(plan_task(model, benchmark, template, n=options.n, seed=options.seed, **given))
    check_tasks(model, tasks, rewards, options.k)
    return tuple(tasks)
