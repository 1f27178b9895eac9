"""What must hold of the options of rollouts and rewards, known before anything starts."""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.hf_folder import is_hf, read_config
from megapsft.config import Config, RolloutConfig, flatten
from megapsft.data.prompts import Prompts
from megapsft.errors import Refused
from megapsft.models.families import check_served
from megapsft.objectives.registry import build_objective
from megapsft.platform.cpu import has_cuda
from megapsft.rewards.registry import build_reward
from megapsft.rollout.base import Sampling
from megapsft.rollout.sglang.server import find_python

OF_SGLANG = (  # keys of `rollout` that only its servers read, and that change how responses come, not which
    "urls", "servers", "tensor_parallel_size", "port", "python", "server_args", "weight_update", "bucket_bytes", "on_update",
    "requests_per_server", "startup_timeout", "request_timeout", "health_interval", "retries", "max_restarts",
)  # fmt: skip
OF_SERVERS_STARTED = ("servers", "tensor_parallel_size", "port", "python", "server_args", "startup_timeout", "max_restarts")
DEFAULTS = RolloutConfig()


def check_options(config: Config) -> None:
    """Refuse options of rollouts and rewards that nothing would read, that contradict each other, or that lack another."""
    options, samples = config.rollout, config.data.kind == "prompts"
    if config.model.moe_routing_replay == "rollout" and not (samples and options.engine == "sglang"):
        rule = "chooses the experts that SGLang chose as it sampled"
        rule += f", and rollout.engine={options.engine}" if samples else f", and data.kind={config.data.kind}: nothing is sampled"
        remedy = "use rollout.engine=sglang with data.kind=prompts, or model.moe_routing_replay=true"
        raise Refused("model.moe_routing_replay=rollout", rule, remedy)
    if not samples:
        _check_nothing_sampled(config)
    if samples or config.evaluate.data:
        _check_engine(config)
    if config.evaluate.data:
        Sampling(temperature=config.evaluate.temperature, top_p=config.evaluate.top_p, max_tokens=config.evaluate.max_tokens)
    if not samples:
        return
    Sampling(temperature=config.train.temperature, top_p=options.top_p, top_k=options.top_k, max_tokens=options.max_tokens)
    if options.fp8:
        _check_fp8(config)
    labels = [build_reward(entry)[0] for entry in config.rewards]
    if not labels:
        remedy = "use rewards='[{name: math_answer}]', see docs/rollout.md"
        raise Refused("rewards=[]", "names none, and sampled responses have no other worth", remedy)
    if options.dynamic_sampling is not None and options.dynamic_sampling not in labels:
        rule = f"is not a reward; there are: {', '.join(labels)}"
        raise Refused(f"rollout.dynamic_sampling={options.dynamic_sampling}", rule, f"use rollout.dynamic_sampling={labels[0]}")
    if options.dynamic_sampling is None and options.max_rounds != DEFAULTS.max_rounds:
        rule = "is of dynamic sampling, which is off"
        remedy = f"set rollout.dynamic_sampling={labels[0]}, or leave it out"
        raise Refused(f"rollout.max_rounds={options.max_rounds}", rule, remedy)
    if options.demonstration_buffer:
        _check_buffer(config)
    if options.oversample < 1:
        raise Refused(f"rollout.oversample={options.oversample}", "must be 1 or more", "1.25 asks for a quarter more")


def _check_nothing_sampled(config: Config) -> None:
    """Only benchmarks are answered, if any."""
    rule, remedy = f"is of sampled responses, and data.kind={config.data.kind}", "use data.kind=prompts, or leave it out"
    of_engine = (*OF_SGLANG, "engine", "max_batch_size") if config.evaluate.data else ()
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        if section == "rollout" and name not in of_engine and value != getattr(DEFAULTS, name):
            raise Refused(f"{key}={value}", rule, remedy)
    if config.rewards:
        raise Refused(f"rewards={list(config.rewards)}", rule, remedy)
    if config.log.rollouts:
        raise Refused(f"log.rollouts={config.log.rollouts}", rule, remedy)


def _check_fp8(config: Config) -> None:
    if config.model.dtype != "bfloat16":
        rule = f"is of bfloat16 weights, and model.dtype={config.model.dtype}"
        raise Refused("rollout.fp8=true", rule, "use model.dtype=bfloat16, or leave it out")
    if not has_cuda():
        rule = "needs a GPU, and there is none: SGLang on a CPU has no kernel for FP8 weights"
        raise Refused("rollout.fp8=true", rule, "leave it out, or train where there are GPUs")


def _check_buffer(config: Config) -> None:
    imitates = list(build_objective(config.objective).keep([0.0, 1.0], [False, True])) == [False, True]
    if not imitates or config.data.select is not None:
        rule = "is of objectives that train a demonstration where no rollout is right"
        what = f"data.select={config.data.select}" if imitates else f"objective.name={config.objective['name']}"
        what += ", gate=null" if "gate" in config.objective and not imitates else ""
        remedy = "use objective.name=hpt with a gate, without data.select, or leave it out"
        raise Refused(f"rollout.demonstration_buffer={config.rollout.demonstration_buffer}", f"{rule}, and {what}", remedy)


def _check_engine(config: Config) -> None:
    options = config.rollout
    if options.engine == "sglang" and (Path(config.model.path) / "config.json").is_file():
        check_served(read_config(config.model.path), "rollout.engine=sglang")
    if options.engine == "inprocess":
        for key in (*OF_SGLANG, "fp8"):
            if getattr(options, key) != getattr(DEFAULTS, key):
                rule = "is of SGLang servers, and rollout.engine=inprocess has none"
                raise Refused(f"rollout.{key}={getattr(options, key)}", rule, "use rollout.engine=sglang, or leave it out")
        for key in ("oversample", "max_weight_lag"):
            if getattr(options, key) != getattr(DEFAULTS, key):
                rule = "needs an engine that samples while the policy is trained, and rollout.engine=inprocess is the policy"
                raise Refused(f"rollout.{key}={getattr(options, key)}", rule, "use rollout.engine=sglang, or leave it out")
    elif options.max_batch_size != DEFAULTS.max_batch_size:
        remedy = "use rollout.requests_per_server, or leave it out"
        raise Refused(f"rollout.max_batch_size={options.max_batch_size}", "is of rollout.engine=inprocess", remedy)
    if options.engine == "sglang" and not options.urls:
        find_python(options.python)
        if config.model.path and not is_hf(Path(config.model.path)):
            rule = "is no Hugging Face folder, which SGLang's servers start from"
            raise Refused(f"model.path={config.model.path}", rule, "megapsft convert megatron-to-hf makes one")
    if options.urls:
        for key in OF_SERVERS_STARTED:
            if getattr(options, key) != getattr(DEFAULTS, key):
                rule = "is of servers that are started here, and rollout.urls names others"
                raise Refused(f"rollout.{key}={getattr(options, key)}", rule, "leave one of the two out")


def check_references(config: Config, prompts: Prompts) -> None:
    """Refuse rows without the reference that a reward compares with."""
    for entry in config.rewards:
        label, reward = build_reward(entry)
        lacking = next((row for row in prompts.prompts if not (row.reference or "").strip()), None)
        if reward.needs_reference and lacking is not None:
            there = ", ".join(map(str, lacking.row))
            rule = f"has no column {config.data.columns.reference!r}, which the reward {label} needs; it has: {there}"
            raise Refused(lacking.source, rule, "name the column: data.columns.reference=answer")
