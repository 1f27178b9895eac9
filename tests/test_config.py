"""The config tree: what overlays what, and that nothing passes unseen. Messages are in tests/test_errors.py."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from megapsft.config import Config, flatten, load_config, to_dict
from megapsft.errors import Refused
from megapsft.train.phases import phases
from megapsft.train.plan import to_yaml
from tests.shipped import CONFIGS

PACKAGE = Path(__file__).parents[1] / "megapsft"


def test_without_a_file_all_is_default():
    assert load_config(None) == Config()


def test_every_key_is_read_somewhere():
    """As `<section>.<key>`, or by a name that the section is handed on under: none is accepted and ignored."""
    reads = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())) if path != PACKAGE / "config.py" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.add((ast.unparse(node.value).rpartition(".")[2], node.attr))
    keys = list(keys_of(Config))
    assert ("critic", "warmup_steps") in keys
    names = {"rollout": ("rollout", "options", "_config"), "evaluate": ("evaluate", "options")}
    unread = [(s, key) for s, key in keys if not reads & {(name, key) for name in names.get(s, (s, "config"))}]
    assert unread == []


def keys_of(cls, section="config"):
    """(innermost section, key) of every leaf of the tree."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from keys_of(field.default_factory, field.name)
        else:
            yield section, field.name


def test_overrides_go_over_the_file_and_the_file_over_its_parents(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "top.yaml").write_text("train: {steps: 1, batch_size: 32, seed: 5}\nmodel: {path: m}\n")
    (tmp_path / "deep/middle.yaml").write_text("base: ../top.yaml\ntrain: {steps: 2, batch_size: 16}\n")
    (tmp_path / "deep/leaf.yaml").write_text("base: middle.yaml\ntrain: {steps: 3}\n")
    config = load_config(tmp_path / "deep/leaf.yaml", ["train.steps=4"])
    assert (config.train.steps, config.train.batch_size, config.train.seed, config.model.path) == (4, 16, 5, "m")
    assert config.train.sft_warmup_lr == Config().train.sft_warmup_lr


def test_the_last_override_of_a_key_counts():
    assert load_config(None, ["train.steps=4", "train.steps=5"]).train.steps == 5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),  # YAML 1.1 reads this as a string
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("train.minibatch_size=null", "train.minibatch_size", None),
        ("train.minibatch_size=8", "train.minibatch_size", 8),
        ("data.packing=false", "data.packing", False),
        ("data.path=a=b.jsonl", "data.path", "a=b.jsonl"),
        ("data.columns={prompt: question}", "data.columns.prompt", "question"),
        ("data.system_prompt='Think: step by step.'", "data.system_prompt", "Think: step by step."),
        ("parallel.recompute_modules=[mlp, layernorm]", "parallel.recompute_modules", ("mlp", "layernorm")),
        ("objective.clip_high=null", "objective.clip_high", None),
    ],
)
def test_values_are_yaml(override, key, value):
    assert flatten(load_config(None, [override]))[key] == value


def test_a_new_objective_drops_the_options_of_the_old_one(tmp_path):
    (tmp_path / "psft.yaml").write_text("objective: {name: psft, clip_high: 0.3}\n")
    assert load_config(tmp_path / "psft.yaml", ["objective.name=sft"]).objective == {"name": "sft"}
    assert load_config(tmp_path / "psft.yaml", ["objective.name=psft"]).objective == {"name": "psft", "clip_high": 0.3}
    assert load_config(tmp_path / "psft.yaml", ["objective.entropy_threshold=0.1"]).objective["clip_high"] == 0.3
    (tmp_path / "sft.yaml").write_text("base: psft.yaml\nobjective: {name: sft, aggregation: seq-mean-token-mean}\n")
    assert load_config(tmp_path / "sft.yaml").objective == {"name": "sft", "aggregation": "seq-mean-token-mean"}


def test_options_without_a_name_are_those_of_psft():
    assert load_config(None, ["objective.clip_high=0.3"]).objective == {"name": "psft", "clip_high": 0.3}


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    tricky = ["parallel.recompute_modules=[mlp]", "optimizer.lr=3e-7", "data.system_prompt='yes'", "run.dir='1'"]
    config = load_config(None, tricky)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(to_yaml(config)).keys() == to_dict(config).keys()


def test_every_key_can_be_overridden_by_its_own_value():
    for key, value in flatten(Config()).items():
        assert load_config(None, [f"{key}={json.dumps(value)}"]) == Config(), key


def test_the_tree_is_frozen():
    config = Config()
    for section in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, section.name, None)
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, None)


def test_no_section_takes_an_unknown_key():
    for section in to_dict(Config()):
        if section not in ("objective", "rewards"):  # whose options are checked by the objective and the rewards themselves
            with pytest.raises(Refused, match="is not a config key"):
                load_config(None, [f"{section}.no_such_key=1"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_are_valid_and_only_their_difference(path):
    config = load_config(path)
    assert phases(config)
    tree = yaml.safe_load(path.read_text())
    without = load_config(path.parent / tree["base"]) if "base" in tree else Config()
    for key, value in flatten(config).items():
        if key in ("objective.name", "train.seed"):  # worth saying even where they are the default
            continue
        said = tree
        for part in key.split("."):
            said = said.get(part) if isinstance(said, dict) else None
        assert said is None or value != flatten(without).get(key), f"{key} of {path} is what it would be without it"
