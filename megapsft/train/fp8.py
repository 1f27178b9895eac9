"""What products in FP8 ask of a run, known before a process starts: of the GPU, of Transformer Engine, of shapes, of the rest.

All of it is a function of the config, the model, the split and the machine, and of nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megapsft.config import Config, FP8Config, spelled
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh
from megapsft.platform.machine import Machine, layers_of

ANY_CHIP = (8, 9)  # Ada; then Hopper 9.0, Blackwell 10.0 and 12.0
BLOCKS_CHIP, BLOCKS_CUDA = (9, 0), (12, 9)
MX_CHIPS = ((10, 0), (12, 0))  # from, and below
OF_DELAYED = ("amax_history_len", "amax_compute_algo")
OFF = "leave fp8 out"


def alignment(fp8: FP8Config) -> int:
    """Sizes of a product are multiples of this: of weights on a rank, and of the tokens that a rank computes at once.

    Source: Transformer Engine, `get_align_size_for_quantization`.
    """
    if fp8.format is None:
        return 1
    return 32 if fp8.recipe == "mxfp8" else 16


def check_fp8(config: Config, hf: HFConfig, mesh: Mesh, machine: Machine, compares: bool) -> None:
    """Whether the run can have its products in FP8 as configured; nothing where it does not ask for them.

    Args:
        compares: whether the objective has a reference in the same process.

    Raises:
        Refused: the first thing that is in the way.
    """
    fp8 = config.fp8
    if fp8.format is None:
        _check_unused(fp8)
        return
    _check_layers(config, machine)
    check_chip(fp8, machine)
    _check_recipe(config, hf, mesh, machine)
    _check_shapes(fp8, hf, mesh)
    if fp8.param_gather:
        _check_param_gather(config, compares)


def note_on_fp8(fp8: FP8Config) -> str | None:
    """What the user should know of the recipe."""
    if fp8.format is None or fp8.recipe != "delayed":
        return None
    return (
        "fp8.recipe=delayed takes its scales from earlier passes: the same weights give other log-probabilities from pass to "
        "pass, which a ratio sees as noise; fp8.recipe=tensorwise does not."
    )


def _check_unused(fp8: FP8Config) -> None:
    for field in dataclasses.fields(fp8):
        value = getattr(fp8, field.name)
        if value != field.default:
            rule = "is of FP8, and fp8.format=null"
            raise Refused(f"fp8.{field.name}={spelled(value)}", rule, "set fp8.format=hybrid, or leave it out")


def _check_layers(config: Config, machine: Machine) -> None:
    what = f"fp8.format={config.fp8.format}"
    if config.model.dtype != "bfloat16":
        rule = f"is of bfloat16 weights, and model.dtype={config.model.dtype}"
        raise Refused(what, rule, f"use model.dtype=bfloat16, or {OFF}")
    if config.model.transformer_impl == "local":
        rule = "is of Transformer Engine's layers, and model.transformer_impl=local"
        raise Refused(what, rule, f"use model.transformer_impl=auto, or {OFF}")
    if layers_of(config.model, machine) == "local":
        rule = f"is of Transformer Engine, which {machine.without_transformer_engine()}"
        raise Refused(what, rule, f"train where it is (docs/gpu.md), or {OFF}")


def check_chip(fp8: FP8Config, machine: Machine) -> None:
    """Refuse a recipe that the GPU does not have."""
    chip, cuda = machine.capability, machine.cuda
    has = f"and this GPU has {chip[0]}.{chip[1]}"
    if chip < ANY_CHIP:
        raise Refused(f"fp8.format={fp8.format}", f"needs compute capability 8.9 or higher, {has}", OFF)
    if fp8.recipe == "blockwise" and (chip < BLOCKS_CHIP or cuda < BLOCKS_CUDA):
        rule = f"needs compute capability 9.0 and CUDA 12.9 or higher, {has} and CUDA {cuda[0]}.{cuda[1]}"
        raise Refused("fp8.recipe=blockwise", rule, "use fp8.recipe=tensorwise")
    if fp8.recipe == "mxfp8" and not MX_CHIPS[0] <= chip < MX_CHIPS[1]:
        remedy = "use fp8.recipe=blockwise" if chip >= BLOCKS_CHIP else "use fp8.recipe=tensorwise"
        raise Refused("fp8.recipe=mxfp8", f"needs compute capability 10.x, {has}", remedy)


def _check_recipe(config: Config, hf: HFConfig, mesh: Mesh, machine: Machine) -> None:
    fp8, parallel = config.fp8, config.parallel
    default = FP8Config()
    for name in OF_DELAYED:
        if fp8.recipe != "delayed" and getattr(fp8, name) != getattr(default, name):
            rule = f"is of fp8.recipe=delayed, and it is {fp8.recipe}"
            raise Refused(f"fp8.{name}={getattr(fp8, name)}", rule, "leave it out")
    in_bf16 = {name: getattr(fp8, f"num_layers_at_{name}_in_bf16") for name in ("start", "end")}
    most = hf.num_hidden_layers // mesh.pp
    for name, layers in in_bf16.items():
        what = f"fp8.num_layers_at_{name}_in_bf16={layers}"
        if layers and fp8.recipe == "delayed":
            rule = "needs scales of each layer by itself, and fp8.recipe=delayed has one state of all"
            raise Refused(what, rule, "use fp8.recipe=tensorwise, or leave it out")
        if layers > most:
            raise Refused(what, f"exceeds the {most} layers of a pipeline stage", f"use {most} or less")
    if sum(in_bf16.values()) >= hf.num_hidden_layers:
        what = " ".join(f"fp8.num_layers_at_{name}_in_bf16={layers}" for name, layers in in_bf16.items())
        raise Refused(what, f"leave none of num_layers={hf.num_hidden_layers} in FP8", f"use less, or {OFF}")
    if parallel.recompute_granularity == "selective" and "layernorm" in parallel.recompute_modules:
        what = "parallel.recompute_modules=layernorm"
        if fp8.recipe == "delayed":
            raise Refused(what, "is not computed again with fp8.recipe=delayed", "use core_attn, or fp8.recipe=tensorwise")
        if machine.transformer_engine < (2, 6):
            version = ".".join(map(str, machine.transformer_engine))
            rule = f"in FP8 needs Transformer Engine 2.6 or newer, and it is {version}"
            raise Refused(what, rule, "use core_attn, or a newer one")


def _check_shapes(fp8: FP8Config, hf: HFConfig, mesh: Mesh) -> None:
    multiple = alignment(fp8)
    for name, size, ranks, of in _sizes(hf, mesh):
        if size // ranks % multiple:
            value = f"{name}={size}" + (f" over {of}={ranks} ranks" if ranks > 1 else "")
            rule = f"gives products of {size // ranks} rows or columns, and fp8.recipe={fp8.recipe} needs multiples of {multiple}"
            remedy = f"use a smaller {of}, or {OFF}" if ranks > 1 and size % multiple == 0 else OFF
            raise Refused(value, rule, remedy)


def _sizes(hf: HFConfig, mesh: Mesh) -> Iterator[tuple[str, int, int, str]]:
    """(what, how many, over how many ranks, of which split) of every side of a weight of a layer."""
    yield "hidden_size", hf.hidden_size, 1, ""
    yield "num_attention_heads x head_dim", hf.num_attention_heads * hf.head_dim, mesh.tp, "tensor_model_parallel_size"
    rows = (hf.num_attention_heads + 2 * hf.num_key_value_heads) * hf.head_dim
    yield "(num_attention_heads + 2 num_key_value_heads) x head_dim", rows, mesh.tp, "tensor_model_parallel_size"
    if hf.num_experts:
        yield "moe_intermediate_size", hf.moe_intermediate_size, mesh.etp, "expert_tensor_parallel_size"
    else:
        yield "intermediate_size", hf.intermediate_size, mesh.tp, "tensor_model_parallel_size"


def _check_param_gather(config: Config, compares: bool) -> None:
    what = "fp8.param_gather=true"
    if not config.parallel.use_distributed_optimizer:
        rule = "is of the distributed optimizer, and parallel.use_distributed_optimizer=false"
        raise Refused(what, rule, "set it to true, or leave fp8.param_gather out")
    if config.fp8.recipe == "mxfp8":
        rule = "with fp8.recipe=mxfp8 gathers through the buffer of gradients, which is not supported here"
        raise Refused(what, rule, "leave fp8.param_gather out")
    if compares:
        rule = "would round a reference's weights each time they are exchanged"
        raise Refused(what, rule, "leave fp8.param_gather out, or choose an objective without a reference")


__all__ = ["alignment", "check_chip", "check_fp8", "note_on_fp8"]
