"""The points of a sweep: one run each, over so many nodes and with one value of everything that is varied."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megapsft.cluster.estimate import Estimate, estimate
from megapsft.cluster.hardware import Machines, gpu_named
from megapsft.cluster.model_folder import shape_of_model
from megapsft.cluster.workload import workload
from megapsft.config import Config, TrainConfig, load_config
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import plan_mesh
from megapsft.platform.chips import GIB
from megapsft.policy.build import model_shape
from megapsft.train.phases import phases
from megapsft.train.plan import check_minibatch

SETTLING = 2  # first steps of a run, which are not measured: memory is allocated, kernels are chosen
BESIDE = (  # a point measures steps of the objective, and nothing beside them; `key=value` may say otherwise
    "train.sft_warmup_steps=0",
    "critic.warmup_steps=0",
    "checkpoint.interval=0",
    "evaluate.data=[]",
    "log.progress=false",
)
SHORT = {  # of sizes of a split, in names of folders and in tables
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
DECIDED = {"run.dir": "--out", "train.steps": "--steps"}  # by an option of the sweep

Scaling = Literal["strong", "weak"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a sweep is."""

    config: str  # YAML of a run
    overrides: tuple[str, ...] = ()
    nodes: tuple[int, ...]
    vary: Mapping[str, tuple[Any, ...]]  # config key -> its values
    scaling: Scaling = "strong"  # the same batch for all, or one that grows with the nodes
    steps: int
    ranks_per_node: int
    gpu: str | None = None  # of the table of `megapsft plan`; None: nothing is predicted

    def __post_init__(self) -> None:
        if self.gpu is not None:
            gpu_named(self.gpu)
        if len(set(self.nodes)) != len(self.nodes) or any(number < 1 for number in self.nodes):
            raise Refused(f"--nodes {_listed(self.nodes)}", "must be numbers of nodes, each once", "write --nodes 1,2,4,8")
        if self.steps <= SETTLING:
            rule = f"leaves nothing to measure after the first {SETTLING}"
            raise Refused(f"--steps {self.steps}", rule, "use 12 or so")
        for override in self.overrides:
            if override.partition("=")[0] in DECIDED:
                raise Refused(override, "is decided by the sweep", f"use {DECIDED[override.partition('=')[0]]}")
        for key, values in self.vary.items():
            if key in DECIDED:
                raise Refused(f"--vary {key}", "is decided by the sweep", f"use {DECIDED[key]}")
            if self.scaling == "weak" and key in ("train.batch_size", "train.minibatch_size"):
                raise Refused(f"--vary {key}", "is what --scaling weak varies", "use --scaling strong, or leave it out")
            if any(override.partition("=")[0] == key for override in self.overrides):
                raise Refused(f"--vary {key}", "has a value among the overrides too", "leave one out")
            if len({str(value) for value in values}) != len(values):
                raise Refused(f"--vary {key}={_listed(values)}", "names a value twice", "name each once")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of a sweep."""

    name: str  # of its folder
    nodes: int
    ranks: int
    varied: Mapping[str, Any]
    config: Config
    predicted: Estimate | None = None
    refused: str = ""  # why it cannot run

    @property
    def split(self) -> str:
        """What tells it from other points of as many nodes."""
        return " ".join(f"{_short(key)}={plain(value)}" for key, value in self.varied.items())


def parse_vary(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`key=1,2` as {key: (1, 2)}; values are YAML, so that [1, 2],[3] are two lists.

    Raises:
        Refused: no key, no value, a key that comes twice.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        try:
            values = yaml.safe_load(f"[{listed}]")
        except yaml.YAMLError:
            values = []
        if not equals or not all(key.split(".")) or not values:
            raise Refused(f"--vary {text}", "names no values of a key", "write --vary parallel.tensor_model_parallel_size=1,2")
        if key in found:
            raise Refused(f"--vary {text}", f"names {key} again", "name all values in one")
        found[key] = tuple(values)
    return found


def points(asked: Asked, folder: Path) -> list[Point]:
    """All of them, by nodes, those that cannot run with the reason.

    Args:
        folder: of the sweep; a run lives in `folder/<name>`.

    Raises:
        Refused: keys or values that no config has; a model whose shape is not known.
    """
    choices = [dict(zip(asked.vary, values, strict=True)) for values in itertools.product(*asked.vary.values())]
    wanted = [(nodes, varied) for nodes in sorted(asked.nodes) for varied in choices]
    names = [_name(nodes, varied) for nodes, varied in wanted]
    numbered = [f"{name}_{number}" if names.count(name) > 1 else name for number, name in enumerate(names)]
    return [_point(asked, folder / name, *one) for name, one in zip(numbered, wanted, strict=True)]


def plain(value: Any) -> str:
    """A value as it is written in `key=value`."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _short(key: str) -> str:
    last = key.rpartition(".")[2]
    return SHORT.get(last, last)


def _name(nodes: int, varied: Mapping[str, Any]) -> str:
    """A folder's name without an =, which would make an override of its path."""
    parts = [f"nodes-{nodes}", *(f"{_short(key)}-{plain(value)}" for key, value in varied.items())]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(parts)).strip("-")


def _point(asked: Asked, run: Path, nodes: int, varied: Mapping[str, Any]) -> Point:
    said = [*BESIDE, *asked.overrides, *(f"{key}={plain(value)}" for key, value in varied.items())]
    config = load_config(asked.config, [*said, f"train.steps={asked.steps}"])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run)))
    if config.parallel.tensor_model_parallel_size == 1 and not any("parallel.sequence_parallel=" in text for text in said):
        parallel = dataclasses.replace(config.parallel, sequence_parallel=None)  # what the file says is of another split
        config = dataclasses.replace(config, parallel=parallel)
    shape, predicted, refused = shape_of_model(Path(asked.config), config.model.path), None, ""
    try:
        if asked.scaling == "weak":
            config = dataclasses.replace(config, train=_grown(config.train, nodes, min(asked.nodes)))
        predicted = _checked(asked, config, shape, nodes)
    except Refused as error:
        refused = f"{error.value}: {error.rule}"
    if predicted is not None and not predicted.fits:
        refused = f"does not fit: {predicted.peak / GIB:.1f} of {predicted.usable / GIB:.1f} GiB"
    told = {"name": run.name, "nodes": nodes, "ranks": nodes * asked.ranks_per_node, "varied": varied}
    return Point(**told, config=config, predicted=predicted, refused=refused)


def _checked(asked: Asked, config: Config, hf: HFConfig, nodes: int) -> Estimate | None:
    """The plan of the point; None where no GPU is named.

    Raises:
        Refused: sizes that do not divide, ranks without a sample.
    """
    if asked.gpu is not None:
        machines = Machines(gpu=gpu_named(asked.gpu), nodes=nodes, gpus_per_node=asked.ranks_per_node)
        return estimate(config, hf, machines)
    check_minibatch(config.train)
    dispatcher = config.model.moe_token_dispatcher_type
    mesh = plan_mesh(config.parallel, nodes * asked.ranks_per_node, model_shape(hf), on_cuda=False, dispatcher=dispatcher)
    workload(config, mesh, phases(config)[-1])
    return None


def _grown(train: TrainConfig, nodes: int, fewest: int) -> TrainConfig:
    """The batch, which is that of the fewest nodes, and its minibatch, as many times as large as there are more nodes."""
    sizes = {"batch_size": train.batch_size, "minibatch_size": train.minibatch_size}
    grown = {name: size * nodes / fewest for name, size in sizes.items() if size is not None}
    for name, size in grown.items():
        if not size.is_integer():
            rule = f"of {fewest} nodes is not a whole number of rows on {nodes}"
            raise Refused(f"train.{name}={sizes[name]}", rule, f"use a multiple of {fewest // math.gcd(nodes, fewest)}")
    return dataclasses.replace(train, **{name: int(size) for name, size in grown.items()})


def _listed(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
