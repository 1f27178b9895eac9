"""The whole typed config tree, its defaults, and how YAML and `key=value` overlay them. Frozen; a typo is an error."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from megapsft.errors import Refused

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
UNKNOWN = ("unexpected_keyword_argument", "unexpected_property")  # what pydantic calls a key that there is not
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives. `dir` names it: the same command on the same `dir` continues it."""

    __pydantic_config__ = STRICT
    dir: str = "runs/default"
    stop_after: PositiveFloat | None = None  # minutes after which it ends, saved and to be continued; None: never


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Hugging Face checkpoint that training starts from, and how Megatron holds it."""

    __pydantic_config__ = STRICT
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations; main parameters are fp32 always
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: the latter where it runs
    make_vocab_size_divisible_by: PositiveInt = 128
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    logprob_chunk_bytes: PositiveInt = 64 * 2**20  # of a chunk of fp32 logits; the head holds about two of them
    logprob_backend: Literal["auto", "torch", "triton", "reference"] = "auto"  # auto: triton on CUDA, else torch
    moe_aux_loss_coeff: NonNegativeFloat = 0.0  # of the balance of experts within each sequence, summed over layers
    moe_routing_replay: Literal[False, True, "rollout"] = False  # true: experts of the old pass again; rollout: of the engine


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    """Products of linear layers in FP8, on GPUs that have it; embedding, head, norms and attention stay as they are."""

    __pydantic_config__ = STRICT
    format: Literal["e4m3", "hybrid"] | None = None  # null: bfloat16; hybrid: e5m2 for gradients, else e4m3
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"  # of scales, see docs/gpu.md
    num_layers_at_start_in_bf16: NonNegativeInt = 0  # not with delayed
    num_layers_at_end_in_bf16: NonNegativeInt = 0  # the same
    amax_history_len: PositiveInt = 1024  # delayed: passes whose largest values are remembered
    amax_compute_algo: Literal["max", "most_recent"] = "max"  # delayed: which of them sets the scale
    param_gather: bool = False  # weights are held, and gathered by the distributed optimizer, in FP8; not mxfp8


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters that are trained instead of the weights: y = W x + alpha / rank B A x, with PEFT's names. See docs/lora.md."""

    __pydantic_config__ = STRICT
    rank: PositiveInt | None = None  # rows of A, columns of B; null: no adapters, all weights are trained
    alpha: PositiveFloat = 32.0  # alpha / rank scales what an adapter adds
    target_modules: tuple[Projection, ...] = get_args(Projection)  # of attention, MLPs and experts alike


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Names of the columns in `data.path`."""

    __pydantic_config__ = STRICT
    prompt: str = "prompt"  # a string, or chat messages [{"role": ..., "content": ...}]
    demonstration: str = "demonstration"  # a string; where kind=rollouts or prompts it may be absent
    reference: str = "reference"  # kind=prompts: the right answer, or a solution that ends with it, where a reward wants one
    chosen: str = "chosen"  # kind=preferences: a string, or chat messages that end with the assistant's
    rejected: str = "rejected"  # the same
    chosen_ref_logprobs: str = "chosen_ref_logprobs"  # optional: a list, one of the reference for each response token
    rejected_ref_logprobs: str = "rejected_ref_logprobs"  # the same
    rollouts: str = "rollouts"  # kind=rollouts: [{"response": ..., "reward": ...}, ...], see docs/data.md
    prompt_token_ids: str = "prompt_token_ids"  # kind=rollouts, optional: a list, instead of the prompt
    demonstration_reward: str = "demonstration_reward"  # kind=rollouts, optional: a number; default: 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    __pydantic_config__ = STRICT
    path: str = ""  # .jsonl or .parquet
    kind: Literal["demonstrations", "preferences", "rollouts", "prompts"] = "demonstrations"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    system_prompt: str | None = None  # put before prompts that have no system turn
    max_length: PositiveInt = 2048  # tokens of prompt and response together
    overlong: Literal["drop", "truncate", "error"] = "drop"
    packing: bool = True
    pack_length: PositiveInt = 4096  # positions in one packed microbatch; never below the longest sample
    micro_batch_size: PositiveInt = 1  # rows in one microbatch where packing is off
    shuffle: bool = True
    limit: PositiveInt | None = None  # only the first rows
    cache: str | None = None  # folder that keeps the tokens, for all ranks and the next runs; null: each rank tokenises all rows
    select: Literal["rft", "raft"] | None = None  # train on the best rollouts alone: all with enough reward, or one a prompt
    select_threshold: float = 1.0  # of rft: the least reward that is kept
    dedupe: bool = False  # of rft: of rollouts of a prompt with the same tokens, keep the first


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled where data.kind=prompts. They are sampled at train.temperature."""

    __pydantic_config__ = STRICT
    engine: Literal["inprocess", "sglang"] = "inprocess"  # the policy itself; or SGLang servers
    n: PositiveInt = 8  # responses to each prompt
    max_tokens: PositiveInt = 512  # of a response
    top_p: PositiveFloat = 1.0  # 1.0: all tokens
    top_k: int = -1  # -1: all tokens
    max_batch_size: PositiveInt = 64  # inprocess: responses at once on each model-parallel group: bounds keys and values
    urls: tuple[str, ...] = ()  # sglang: servers that run already, or their router; default: `servers` of them are started here
    servers: PositiveInt = 1  # sglang: started on this machine, one after another port
    tensor_parallel_size: PositiveInt = 1  # sglang: of each server that is started
    port: NonNegativeInt = 0  # sglang: of the first server that is started; 0: any that is free
    python: str | None = None  # sglang: the interpreter that has it; default: $MEGAPSFT_SGLANG_PYTHON, .venv-sglang, or this one
    server_args: tuple[str, ...] = ()  # sglang: more arguments of sglang.launch_server
    weight_update: Literal["tensor", "disk", "distributed"] = "tensor"  # sglang: by memory of this host, a folder, a group
    bucket_bytes: PositiveInt = 512 * 2**20  # sglang: of weights that are on their way at once
    fp8: bool = False  # sglang on GPUs: it samples from the weights in FP8, in blocks; the policy stays bfloat16
    on_update: Literal["abort", "retract", "in_place"] = "in_place"  # sglang: what becomes of responses on their way
    requests_per_server: PositiveInt = 256  # sglang: at once
    startup_timeout: PositiveFloat = 600.0  # sglang: seconds until a server must be healthy
    request_timeout: PositiveFloat = 600.0  # sglang: seconds for one response, then another server is asked
    health_interval: PositiveFloat = 10.0  # sglang: seconds
    retries: NonNegativeInt = 3  # sglang: of one response on other servers, before the run stops
    max_restarts: NonNegativeInt = 3  # sglang: of servers that were started here, in one run
    dynamic_sampling: str | None = None  # label of a reward: groups in which it is the same for all are sampled anew, as in DAPO
    max_rounds: PositiveInt = 10  # of dynamic sampling in a step; then it trains what there is
    demonstration_buffer: NonNegativeInt = 0  # hpt: demonstrations wait until there are so many (ReLIFT: 128); 0: they do not
    oversample: float = 1.0  # sglang: prompts on their way, over train.batch_size; the step takes the first groups that are done
    max_weight_lag: NonNegativeInt = 0  # sglang: steps that a rollout may be behind; above 0 it is sampled during updates
    reward_workers: PositiveInt = 2  # processes that verify answers


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Benchmarks that are answered while training: before the first step, every `interval` steps, and after the last."""

    __pydantic_config__ = STRICT
    data: tuple[str, ...] = ()  # .jsonl files of problems with their answers; without any, nothing is evaluated
    interval: PositiveInt = 50  # steps
    n: PositiveInt = 1  # responses to each problem
    temperature: NonNegativeFloat = 0.7  # 0: greedy
    top_p: PositiveFloat = 0.95  # 1.0: all tokens
    max_tokens: PositiveInt = 512  # of a response
    limit: PositiveInt | None = None  # only the first problems
    reward: str = "math_answer"  # what says that a response is right


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    __pydantic_config__ = STRICT
    steps: PositiveInt = 100  # batches of the source, after the warm-up; a step has batch_size / minibatch_size updates
    batch_size: PositiveInt = 256  # rows a step: demonstrations, pairs or prompts; the old policy is refreshed once a step
    minibatch_size: PositiveInt | None = None  # rows an update; default: batch_size
    sft_warmup_steps: NonNegativeInt = 0  # steps of plain SFT before the objective, with their own optimizer state
    sft_warmup_lr: NonNegativeFloat = 2e-5  # constant
    temperature: PositiveFloat = 1.0  # divides the logits in every pass; for rollouts, the temperature they were sampled at
    no_grad_microbatches: PositiveInt = 1  # packed ones that a pass of the old or reference policy takes as one; 1: same bits
    max_noise_clipped: NonNegativeFloat | None = None  # share of ratios: more are refused; null: 0.001 with fp8; 1: any
    seed: int = 1234
    max_skipped_updates: PositiveInt = 10  # updates skipped one after the other before the run stops
    hang_factor: PositiveFloat | None = 20.0  # no update for so many median steps: stacks are written, and it ends; None: never
    hang_seconds: PositiveFloat = 600.0  # but never sooner


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The learning rate advances once a step, not once an update."""

    __pydantic_config__ = STRICT
    lr: NonNegativeFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0  # cosine and linear end here
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: NonNegativeFloat = 0.9
    adam_beta2: NonNegativeFloat = 0.999
    adam_eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen policy that some objectives compare with."""

    __pydantic_config__ = STRICT
    path: str | None = None  # a Hugging Face folder; default: the weights that the objective's phase starts from
    placement: Literal["swap", "copy"] = "swap"  # in host memory, exchanged for each pass; or a second model on the device


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value function of PPO: a model of the policy's architecture with a scalar head, and its own AdamW."""

    __pydantic_config__ = STRICT
    path: str | None = None  # a Hugging Face folder of the same architecture; default: model.path
    lr: NonNegativeFloat = 1e-5  # constant
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 0  # the first of train.steps, which train the critic alone; the policy's schedule follows


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The split, in Megatron's names. Data parallelism is what the world size leaves."""

    __pydantic_config__ = STRICT
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1
    expert_model_parallel_size: PositiveInt = 1
    expert_tensor_parallel_size: PositiveInt | None = None  # default: tensor_model_parallel_size
    sequence_parallel: bool | None = None  # default: on where Megatron needs it (MoE with tensor parallelism)
    use_distributed_optimizer: bool = False  # ZeRO-1
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    overlap_p2p_comm: bool | None = None  # default: on with virtual pipeline stages, which need it
    batch_p2p_comm: bool | None = None  # default: the opposite of overlap_p2p_comm
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_modules: tuple[str, ...] = ("core_attn",)  # where selective
    timeout_minutes: PositiveInt = 30  # of a collective


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    __pydantic_config__ = STRICT
    interval: NonNegativeInt = 50  # steps; the end of a phase is always saved; 0: only that
    keep_last: NonNegativeInt = 2
    keep_best: bool = False  # also the one with the lowest `best_metric`, averaged since the checkpoint before
    best_metric: str = "train/loss"
    async_save: bool = True
    load_optimizer: bool = True


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    __pydantic_config__ = STRICT
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megapsft"
    progress: bool = True
    rollouts: NonNegativeInt = 0  # every so many steps all rollouts of the step go to RUN/rollouts/step-*.jsonl; 0: never
    tokens: NonNegativeInt = 0  # every so many steps samples go to RUN/tokens, token by token, and counts of all; 0: never
    tokens_rows: PositiveInt = 4  # of each update of such a step: samples
    peak_flops: PositiveFloat | None = None  # FLOP/s of a device in bfloat16, for perf/mfu; None: of the GPUs that are known


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What is watched closely, in RUN/profile; it changes no number (docs/profiling.md)."""

    __pydantic_config__ = STRICT
    steps: tuple[PositiveInt, PositiveInt] | None = None  # the first and the last, counted from 1; None: none, or `--profile`
    ranks: tuple[NonNegativeInt, ...] = (0,)  # whose; []: all
    tool: Literal["torch", "nsys"] = "torch"  # traces; or ranges alone, for `nsys profile --capture-range=cudaProfilerApi`
    memory: bool = True  # torch on CUDA: also a snapshot of the device's memory
    details: bool = False  # torch: also shapes and Python stacks, which take time and room


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is. `objective` holds `name` and that objective's own options (`megapsft/objectives/<name>.py`).

    So do the entries of `rewards` (`megapsft/rewards/<name>.py`), and each a `weight` and a `label` of its metrics.
    """

    __pydantic_config__ = STRICT
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "psft"})
    rewards: tuple[dict[str, Any], ...] = ()  # of sampled responses: [{name: math_answer}, {name: format, weight: 0.1}], summed
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, overlaid by the YAML file's parents (`base: other.yaml`), the file, and `key=value` overrides.

    Raises:
        Refused: unknown key (lists the known ones), value of another type, missing file, malformed YAML or override.
    """
    tree = read_yaml(Path(path)) if path is not None else {}
    for override in sorted(overrides, key=lambda text: not text.startswith("objective.name=")):  # it drops another's options
        merge(tree, parse_override(override))
    if isinstance(tree.setdefault("objective", {}), dict):
        tree["objective"].setdefault("name", "psft")
    return build(Config, tree)


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The YAML mapping at `path` over that of its one parent, named by `base:` relative to the file."""
    if path.resolve() in children:
        raise Refused(f"{children[-1]}: base", f"makes {path} a parent of itself", "name another file, or none")
    if not path.is_file():
        raise Refused(str(path), "is not a file", "name a config such as configs/psft/tiny-qwen3-gsm8k.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(str(path), f"is not YAML ({' '.join(str(error).split())})", "mend the file") from None
    if not isinstance(tree, dict):
        raise Refused(str(path), f"holds a {type(tree).__name__}", "write a mapping such as `train: {steps: 100}`")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise Refused(f"{path}: base: {base!r}", "is not a file name", "name one parent, relative to this file")
    return merge(read_yaml(path.parent / base, (*children, path.resolve())), tree)


def merge(tree: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay `over` on `tree` in place; mappings merge, all else is replaced. A new `objective.name` drops old options."""
    for key, value in over.items():
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            if key == "objective" and value.get("name", old.get("name")) != old.get("name"):
                old.clear()
            merge(old, value)
        else:
            tree[key] = merge({}, value) if isinstance(value, Mapping) else value
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}; the value is YAML, and numbers such as 1e-5 are numbers."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise Refused(repr(text), "is not an override", "write key=value, for example train.steps=200")
    try:
        tree: Any = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise Refused(repr(text), f"has a value that is not YAML ({' '.join(str(error).split())})", "quote the value") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def build(cls: type, tree: Mapping[str, Any], at: str = "") -> Any:
    """An instance of the frozen dataclass `cls` from plain values, checked for unknown keys and types.

    YAML 1.1 reads `1e-5` as a string, so strings that are numbers are taken where a number is asked for.
    """
    try:
        built = TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        problems = error.errors()  # a key that is missing may be one that is spelled otherwise
        problem = next((one for one in problems if one["type"] in UNKNOWN), problems[0])
    else:
        _refuse_booleans(tree, built, at)
        return built
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(([at] if at else []) + loc)
    if problem["type"] in UNKNOWN:
        known = known_keys(cls, loc[:-1])
        close = difflib.get_close_matches(loc[-1], known, n=1)
        remedy = (f"did you mean {close[0]!r}? " if close else "") + "known keys here: " + ", ".join(known)
        raise Refused(key, "is not a config key", remedy)
    rule, remedy = problem["msg"][0].lower() + problem["msg"][1:], "see `megapsft config` for the keys and their defaults"
    if problem["type"] == "tuple_type":
        rule, remedy = "is not a list", "write one such as [a,b]; [] is none"
    if problem["type"] == "missing":
        if not isinstance(problem["loc"][-1], int):
            raise Refused(key, "is missing", "add it")
        key, rule = ".".join(key.split(".")[:-1]), "has too few values"
    raise Refused(f"{key}={spelled(problem['input'])}", rule, remedy)


def _refuse_booleans(tree: Mapping[str, Any], built: Any, at: str) -> None:
    """To pydantic `true` is a number, too."""
    for name, value in tree.items():
        found, key = built[name] if isinstance(built, dict) else getattr(built, name), f"{at}.{name}" if at else name
        if isinstance(value, Mapping) and (isinstance(found, dict) or dataclasses.is_dataclass(found)):
            _refuse_booleans(value, found, key)
        elif isinstance(value, bool) and not isinstance(found, bool):
            raise Refused(f"{key}={spelled(value)}", "is not a number", "see `megapsft config` for the keys and their defaults")


def spelled(value: Any) -> str:
    """A value as it is given on the command line.

    Example:
        >>> spelled(("q_proj", None, True))
        '[q_proj,null,true]'
    """
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    names = {None: "null", True: "true", False: "false", "": "''"}
    return names[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def known_keys(cls: Any, loc: Sequence[str]) -> list[str]:
    """Field names of the dataclass found at `loc` under `cls`."""
    for part in loc:
        hints = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        cls = hints[part]
    return [f.name for f in dataclasses.fields(cls)]


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain values, for YAML and for comparison."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """`{"train.steps": 100, ...}`: every key with its value."""
    return flatten_tree(to_dict(config))


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same of what a config.yaml holds, whichever version wrote it."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(tree, "")
    return flat
