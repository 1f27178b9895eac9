"""The config of a pipeline: a first model, stages that are a `megapsft train` each, and how the models are compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megapsft.config import STRICT, Config, build, flatten, load_config, merge, parse_override, read_yaml
from megapsft.errors import Refused

START = "start"  # what is before the first stage
EXPORT = "hf"  # folder of a stage's run with the model that it made
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Where a pipeline lives."""

    __pydantic_config__ = STRICT
    dir: str = "runs/default"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A training run. It lives in RUN/<name>, and starts from the model that the stage before it made."""

    __pydantic_config__ = STRICT
    name: str
    config: str  # YAML as for `megapsft train`, relative to the pipeline's file
    set: dict[str, Any] = field(default_factory=dict)  # over the file; {stage: NAME} is the folder with the model of that stage


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Benchmarks that the first model answers, and the model of each stage."""

    __pydantic_config__ = STRICT
    data: tuple[str, ...] = ()  # .jsonl files of problems with their answers; without any, nothing is compared
    n: PositiveInt = 8  # responses to each problem
    temperature: NonNegativeFloat = 1.0  # 0: greedy
    top_p: PositiveFloat = 1.0
    max_tokens: PositiveInt = 512  # of a response
    limit: PositiveInt | None = None  # only the first problems
    k: tuple[PositiveInt, ...] = ()  # of pass@k; without any: 1, 8 and 32, as far as n goes
    reward: str = "math_answer"  # what says that a response is right
    seed: NonNegativeInt = 0  # of the responses


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Everything a pipeline is. `run.dir` names it: the same command on the same `run.dir` continues it."""

    __pydantic_config__ = STRICT
    run: FolderConfig = field(default_factory=FolderConfig)
    model: str = ""  # where the first stage starts
    stages: tuple[StageConfig, ...] = ()
    compare: CompareConfig = field(default_factory=CompareConfig)

    def export(self, name: str) -> Path:
        """The folder with the model of a stage; of START that of the first model."""
        return Path(self.model) if name == START else Path(self.run.dir) / name / EXPORT


OF_PIPELINE = tuple(key.name for key in dataclasses.fields(PipelineConfig))


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The YAML file, overlaid by `STAGE.key=value` of a stage, and by `run.dir=`, `model=` and `compare.key=value`.

    Raises:
        Refused: unknown key (lists the known ones) or stage, value of another type, missing file, malformed YAML or override,
            stages without names of their own.
    """
    tree = read_yaml(path)
    stages = tree.pop("stages", None)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        rule, remedy = "is not a list of stages", "write `stages: [{name: psft, config: psft.yaml}, ...]`"
        raise Refused(f"{path}: stages={stages!r}", rule, remedy)
    built = [build(StageConfig, stage, f"stages.{number}") for number, stage in enumerate(stages)]
    _check_names([stage.name for stage in built])
    of_stages: dict[str, dict[str, Any]] = {stage.name: merge({}, stage.set) for stage in built}
    for override in sorted(overrides, key=lambda text: ".objective.name=" not in text):  # it drops another's options
        (first, value), *_ = parse_override(override).items()
        if first in of_stages and isinstance(value, dict):
            merge(of_stages[first], value)
        elif first in OF_PIPELINE and first != "stages":
            merge(tree, {first: value})
        else:
            known = [*(f"{name}.KEY" for name in of_stages), *(key for key in OF_PIPELINE if key != "stages")]
            raise Refused(repr(override), "is of no stage, and of nothing else that a pipeline has", f"use {', '.join(known)}")
    whole = [dataclasses.replace(stage, config=str(path.parent / stage.config), set=of_stages[stage.name]) for stage in built]
    pipeline = build(PipelineConfig, tree | {"stages": whole})
    if not pipeline.model:
        raise Refused("model=''", "names no model", "give the Hugging Face folder that the first stage starts from")
    if not pipeline.compare.data and pipeline.compare != CompareConfig():
        raise Refused("compare.data=[]", "names no file, and compare has other keys", "name one, or leave compare out")
    return pipeline


def stage_config(pipeline: PipelineConfig, number: int) -> Config:
    """What the stage trains: its file, what is `set` over it, its folder, and the model of the stage before.

    Raises:
        Refused: as `load_config`; a `set` of what the pipeline decides, or {stage: NAME} of no earlier stage.
    """
    stage = pipeline.stages[number]
    earlier = [START, *(before.name for before in pipeline.stages[:number])]
    for section, key in (("run", "dir"), ("model", "path")):
        if key in (stage.set.get(section) or {}):
            rule, remedy = "is what the pipeline decides", "leave it out; run.dir and model stand in the pipeline's config"
            raise Refused(f"{stage.name}.{section}.{key}", rule, remedy)
    tree = merge(read_yaml(Path(stage.config)), _with_folders(pipeline, stage.name, earlier, stage.set))
    folder = str(Path(pipeline.run.dir) / stage.name)
    merge(tree, {"run": {"dir": folder}, "model": {"path": str(pipeline.export(earlier[-1]))}})
    if isinstance(tree.setdefault("objective", {}), dict):
        tree["objective"].setdefault("name", "psft")
    return build(Config, tree, stage.name)


def _with_folders(pipeline: PipelineConfig, name: str, earlier: Sequence[str], tree: Any) -> Any:
    """The values with the folder of its model for every {stage: NAME}."""
    if isinstance(tree, Mapping) and set(tree) == {"stage"}:
        if tree["stage"] not in earlier:
            rule = f"names no stage before {name}"
            raise Refused(f"{{stage: {tree['stage']}}}", rule, f"use one of {', '.join(earlier)}")
        return str(pipeline.export(tree["stage"]))
    if isinstance(tree, Mapping):
        return {key: _with_folders(pipeline, name, earlier, value) for key, value in tree.items()}
    return tree


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise Refused(f"stage {name!r}", "is no name of a folder", "use letters, digits, - and _")
        if name in (START, *OF_PIPELINE):
            raise Refused(f"stage {name!r}", "is called as something else that a pipeline has", "rename it")
        if names.count(name) > 1:
            raise Refused(f"stage {name!r}", "is there twice", "give each stage a name of its own")


def differences(config: Config, stage: StageConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, that of the stage's own file) of all that differ, in the order of the config."""
    file = flatten(load_config(stage.config))
    for key, value in flatten(config).items():
        if file.get(key) != value:
            yield key, value, file.get(key)
