"""What FP8 asks of a run: every rule, without a GPU. Not here: that a run obeys (tests/policy/test_transformer_engine.py)."""

from __future__ import annotations

import dataclasses

import pytest

from megapsft.config import FP8Config, load_config
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import plan_mesh
from megapsft.platform.machine import Machine
from megapsft.policy.build import fp8_options, model_shape
from megapsft.train.fp8 import alignment, check_fp8, note_on_fp8

AMPERE, ADA, HOPPER, BLACKWELL, DESKTOP = (
    Machine(capability=chip, cuda=(13, 0), transformer_engine=(2, 19)) for chip in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
)
ON, TP = "fp8.format=hybrid", "parallel.tensor_model_parallel_size"
SIZES = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=500, hidden_size=256, intermediate_size=768,
             num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=512,
             rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, rope_theta=1e4)  # fmt: skip
EXPERTS = dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2,
               moe_intermediate_size=96, norm_topk_prob=True)  # fmt: skip


def ask(*overrides, machine=HOPPER, compares=False, world=1, **sizes):
    config, hf = load_config(None, overrides), HFConfig.parse(SIZES | sizes)
    mesh = plan_mesh(config.parallel, world, model_shape(hf), on_cuda=True)
    check_fp8(config, hf, mesh, machine, compares)


@pytest.mark.parametrize(
    ("recipe", "machines"),
    [
        ("delayed", [ADA, HOPPER, BLACKWELL, DESKTOP]),
        ("tensorwise", [ADA, HOPPER, BLACKWELL, DESKTOP]),
        ("blockwise", [HOPPER, BLACKWELL, DESKTOP]),
        ("mxfp8", [BLACKWELL]),
    ],
)
def test_each_recipe_on_the_chips_that_have_it(recipe, machines):
    for machine in (AMPERE, ADA, HOPPER, BLACKWELL, DESKTOP):
        if machine in machines:
            ask(ON, f"fp8.recipe={recipe}", machine=machine)
            ask(ON, f"fp8.recipe={recipe}", machine=machine, **EXPERTS)
        else:
            with pytest.raises(Refused, match="compute capability"):
                ask(ON, f"fp8.recipe={recipe}", machine=machine)


CASES = {
    "nothing without a format": ("fp8.recipe=blockwise", {}, "fp8.recipe=blockwise", "is of FP8, and fp8.format=null", "set fp8"),
    "no gather without a format": ("fp8.param_gather=true", {}, "fp8.param_gather=true", "is of FP8", "leave it out"),
    "no GPU": (ON, dict(machine=Machine()), "fp8.format=hybrid", "needs a CUDA GPU", "leave fp8 out"),
    "no Transformer Engine": (ON, dict(machine=dataclasses.replace(HOPPER, transformer_engine=None)), "fp8.format=hybrid",
                              "is not installed", "docs/gpu.md"),
    "old Transformer Engine": (ON, dict(machine=dataclasses.replace(HOPPER, transformer_engine=(2, 1))), "fp8.format=hybrid",
                               "is 2.1, and 2.3 or newer is needed", "docs/gpu.md"),
    "broken Transformer Engine": (ON, dict(machine=dataclasses.replace(HOPPER, problem="ImportError: libcudnn")),
                                  "fp8.format=hybrid", "cannot be imported: ImportError: libcudnn", "docs/gpu.md"),
    "local layers": (f"{ON} model.transformer_impl=local", {}, "fp8.format=hybrid", "model.transformer_impl=local", "auto"),
    "float32": (f"{ON} model.dtype=float32", {}, "fp8.format=hybrid", "model.dtype=float32", "model.dtype=bfloat16"),
    "old chip": (ON, dict(machine=AMPERE), "fp8.format=hybrid", "8.9 or higher, and this GPU has 8.0", "leave fp8 out"),
    "blocks on Ada": (f"{ON} fp8.recipe=blockwise", dict(machine=ADA), "fp8.recipe=blockwise", "9.0 and CUDA 12.9", "tensorwise"),
    "blocks with old CUDA": (f"{ON} fp8.recipe=blockwise", dict(machine=dataclasses.replace(HOPPER, cuda=(12, 8))),
                             "fp8.recipe=blockwise", "this GPU has 9.0 and CUDA 12.8", "fp8.recipe=tensorwise"),
    "mxfp8 on Hopper": (f"{ON} fp8.recipe=mxfp8", {}, "fp8.recipe=mxfp8", "10.x, and this GPU has 9.0", "fp8.recipe=blockwise"),
    "mxfp8 on Ada": (f"{ON} fp8.recipe=mxfp8", dict(machine=ADA), "fp8.recipe=mxfp8", "has 8.9", "fp8.recipe=tensorwise"),
    "history of current scales": (f"{ON} fp8.amax_history_len=16", {}, "fp8.amax_history_len=16", "of fp8.recipe=delayed",
                                  "leave it out"),
    "algorithm of current scales": (f"{ON} fp8.amax_compute_algo=most_recent", {}, "fp8.amax_compute_algo=most_recent",
                                    "of fp8.recipe=delayed", "leave it out"),
    "first layers with delayed": (f"{ON} fp8.recipe=delayed fp8.num_layers_at_start_in_bf16=1", {},
                                  "fp8.num_layers_at_start_in_bf16=1", "one state of all", "fp8.recipe=tensorwise"),
    "last layers of a stage": (f"{ON} parallel.pipeline_model_parallel_size=4 fp8.num_layers_at_end_in_bf16=3", dict(world=4),
                               "fp8.num_layers_at_end_in_bf16=3", "exceeds the 2 layers of a pipeline stage", "use 2 or less"),
    "no layer left": (f"{ON} fp8.num_layers_at_start_in_bf16=5 fp8.num_layers_at_end_in_bf16=3", {},
                      "fp8.num_layers_at_start_in_bf16=5 fp8.num_layers_at_end_in_bf16=3", "leave none of num_layers=8",
                      "leave fp8 out"),
    "norms again with delayed": (f"{ON} fp8.recipe=delayed parallel.recompute_granularity=selective "
                                 "parallel.recompute_modules=[layernorm]", {}, "parallel.recompute_modules=layernorm",
                                 "is not computed again", "fp8.recipe=tensorwise"),
    "norms again before 2.6": (f"{ON} parallel.recompute_granularity=selective parallel.recompute_modules=[layernorm]",
                               dict(machine=dataclasses.replace(HOPPER, transformer_engine=(2, 5))),
                               "parallel.recompute_modules=layernorm", "2.6 or newer, and it is 2.5", "a newer one"),
    "hidden size": (ON, dict(hidden_size=248), "hidden_size=248", "needs multiples of 16", "leave fp8 out"),
    "shard of the ffn": (f"{ON} {TP}=4", dict(world=4, intermediate_size=96),
                         "intermediate_size=96 over tensor_model_parallel_size=4 ranks", "products of 24 rows or columns",
                         "use a smaller tensor_model_parallel_size"),
    "shard of an expert": (f"{ON} parallel.expert_model_parallel_size=2 parallel.expert_tensor_parallel_size=4 {TP}=4",
                           dict(world=8, **EXPERTS), "moe_intermediate_size=96 over expert_tensor_parallel_size=4 ranks",
                           "products of 24", "use a smaller expert_tensor_parallel_size"),
    "blocks of 32": (f"{ON} fp8.recipe=mxfp8", dict(machine=BLACKWELL, intermediate_size=784), "intermediate_size=784",
                     "fp8.recipe=mxfp8 needs multiples of 32", "leave fp8 out"),
    "gather of the plain optimizer": (f"{ON} fp8.param_gather=true", {}, "fp8.param_gather=true",
                                      "parallel.use_distributed_optimizer=false", "set it to true"),
    "gather of mxfp8": (f"{ON} fp8.recipe=mxfp8 fp8.param_gather=true parallel.use_distributed_optimizer=true",
                        dict(machine=BLACKWELL), "fp8.param_gather=true", "buffer of gradients", "leave fp8.param_gather out"),
    "gather beside a reference": (f"{ON} fp8.param_gather=true parallel.use_distributed_optimizer=true", dict(compares=True),
                                  "fp8.param_gather=true", "a reference's weights", "without a reference"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_cannot_be_says_why_and_what_to_do(case):
    overrides, where, value, rule, remedy = case
    with pytest.raises(Refused) as caught:
        ask(*overrides.split(), **where)
    assert value in caught.value.value
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ("", dict(machine=Machine())),
        ("model.dtype=float32", dict(machine=AMPERE)),
        (f"{ON} fp8.num_layers_at_start_in_bf16=1 fp8.num_layers_at_end_in_bf16=1", {}),
        (f"{ON} fp8.recipe=delayed fp8.amax_history_len=16 fp8.amax_compute_algo=most_recent", {}),
        (f"{ON} fp8.param_gather=true parallel.use_distributed_optimizer=true", {}),
        (f"{ON} fp8.recipe=blockwise {TP}=4", dict(world=4)),
        (f"{ON} parallel.expert_model_parallel_size=8 {TP}=2 parallel.expert_tensor_parallel_size=1", dict(world=8, **EXPERTS)),
    ],
)
def test_what_can_be_is_not_refused(overrides, where):
    ask(*overrides.split(), **where)


@pytest.mark.parametrize(("options", "multiple"), [({}, 1), (dict(format="e4m3"), 16), (dict(format="e4m3", recipe="mxfp8"), 32)])
def test_tokens_of_a_rank_are_padded_to_what_products_take(options, multiple):
    assert alignment(FP8Config(**options)) == multiple


def test_megatron_is_told_everything():
    options = fp8_options(FP8Config(format="hybrid", recipe="blockwise", num_layers_at_end_in_bf16=2, param_gather=True))
    assert options == dict(
        fp8="hybrid", fp8_recipe="blockwise", fp8_param=True, first_last_layers_bf16=True, num_layers_at_start_in_bf16=0,
        num_layers_at_end_in_bf16=2, fp8_amax_history_len=1024, fp8_amax_compute_algo="max",
    )  # fmt: skip
    assert not fp8_options(FP8Config(format="e4m3"))["first_last_layers_bf16"]


def test_delayed_scales_are_noise_in_a_ratio_and_the_user_is_told():
    assert note_on_fp8(FP8Config()) is note_on_fp8(FP8Config(format="hybrid")) is None
    assert "a ratio sees as noise" in note_on_fp8(FP8Config(format="hybrid", recipe="delayed"))
