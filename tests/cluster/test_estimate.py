"""What a plan says of splits, and what it refuses. Bytes are compared in test_memory.py, seconds in test_published.py."""

from __future__ import annotations

import dataclasses

import pytest

from megapsft.checkpoint.hf import read_config
from megapsft.cluster.activations import chunks_in_flight
from megapsft.cluster.estimate import Estimate, estimate
from megapsft.cluster.hardware import Machines, gpu_named
from megapsft.cluster.model_folder import shape_of_model
from megapsft.cluster.propose import overrides, propose
from megapsft.cluster.sizes import of_stage
from megapsft.cluster.traffic import groups
from megapsft.config import Config, load_config
from megapsft.errors import Refused
from megapsft.models.families import parameter_count
from megapsft.platform.chips import GPUS
from tests.shipped import FOLDER, OBJECTIVES

DENSE, MOE = (read_config(FOLDER / "models" / name) for name in ("Qwen2.5-7B-Instruct", "Qwen3-30B-A3B-Instruct-2507"))
P = "parallel."
TP, PP, VPP = (f"{P}{kind}model_parallel_size" for kind in ("tensor_", "pipeline_", "virtual_pipeline_"))
CP, EP, ETP = f"{P}context_parallel_size", f"{P}expert_model_parallel_size", f"{P}expert_tensor_parallel_size"
ZERO1, FULL = f"{P}use_distributed_optimizer=true", f"{P}recompute_granularity=full"


def config(*options: str) -> Config:
    return load_config(None, ["objective.name=sft", "model.path=models/x", "data.max_length=4096", *options])


def machines(nodes: int = 1, gpus: int = 8, gpu: str = "h100") -> Machines:
    return Machines(gpu=GPUS[gpu], nodes=nodes, gpus_per_node=gpus)


def plan(*options: str, hf=DENSE, **where) -> Estimate:
    return estimate(config(*options), hf, machines(**where))


@pytest.mark.parametrize(
    ("hf", "options", "message", "remedy"),
    [
        (DENSE, [f"{TP}=8"], "must divide num_attention_heads=28", "use 1, 2, 4"),
        (DENSE, [f"{PP}=8"], "must divide num_layers=28", "use 1, 2, 4, 7, 14, 28"),
        (DENSE, [f"{PP}=2", f"{VPP}=4"], "must divide num_layers=28", "use"),
        (MOE, [f"{EP}=3"], "must divide num_experts=128", "use 1, 2, 4, 8"),
        (DENSE, [f"{EP}=2"], "the model has no experts", "leave both out"),
        (DENSE, [f"{CP}=3"], "must be a multiple of", "start 3 processes"),
        (MOE, [f"{P}sequence_parallel=true"], "needs tensor_model_parallel_size > 1", "set sequence_parallel=false"),
        (DENSE, ["train.batch_size=256", "train.minibatch_size=100"], "must divide train.batch_size=256", "use 128"),
        (DENSE, ["train.batch_size=4"], "the others would be idle", f"use 4 GPUs.*{CP}=2"),
        (DENSE, ["objective.name=dpo", "data.kind=preferences", "train.batch_size=4"], "for the 4 samples", "use 4 GPUs"),
        (DENSE, ["data.max_length=65536"], "exceeds max_position_embeddings=32768", "use data.max_length=32768 or less"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(hf, options, message, remedy):
    with pytest.raises(Refused, match=f"(?s){message}.*; {remedy}"):
        plan(*options, hf=hf)


def test_machines_that_there_are_not():
    with pytest.raises(Refused, match="--gpu v100: is not in the table; use one of a100"):
        gpu_named("v100")
    with pytest.raises(Refused, match="--nodes 0: must be 1 or more"):
        machines(nodes=0)


@pytest.mark.parametrize("hf", [DENSE, MOE], ids=["dense", "moe"])
def test_every_parameter_is_on_some_rank(hf):
    options = [f"{PP}=4", f"{EP}=2" if hf.num_experts else f"{TP}=2"]
    found = plan(*options, hf=hf)
    split = found.mesh.tp
    on_ranks = 0
    for stage in range(4):
        for chunk in of_stage(hf, found.mesh, 1, stage):
            on_ranks += chunk.dense.plain * split + chunk.expert.plain * found.mesh.ep
    replicated = (split - 1) * hf.hidden_size * (2 * hf.num_hidden_layers + 1)  # norms are on all ranks of a tensor group
    assert on_ranks == parameter_count(hf) + replicated


def test_sharding_the_optimizer_saves_what_the_ranks_share():
    whole, sharded = (plan(*options).stages[0] for options in ([], [ZERO1]))
    assert sharded.optimizer == pytest.approx(whole.optimizer / 8, rel=1e-4)
    assert sharded.gradients == pytest.approx(whole.gradients, rel=1e-4)


def test_recomputation_trades_memory_for_time():
    plain, core, full = (plan(*options) for options in ([], [f"{P}recompute_granularity=selective"], [FULL]))
    assert full.stages[0].activations < 0.2 * plain.stages[0].activations
    assert full.stages[0].activations < core.stages[0].activations <= plain.stages[0].activations
    assert plain.time.compute < core.time.compute < full.time.compute < 1.34 * plain.time.compute


def test_recomputing_experts_drops_what_they_keep():
    modules = [f"{P}recompute_granularity=selective", f"{P}recompute_modules=[moe]"]
    plain, moe = (plan(f"{EP}=8", *more, hf=MOE) for more in ([], modules))
    assert moe.stages[0].activations < 0.5 * plain.stages[0].activations


def test_products_in_fp8_take_less_time_where_a_gpu_has_them_and_are_refused_elsewhere():
    assert plan("fp8.format=hybrid").time.total < plan().time.total
    with pytest.raises(Refused, match="fp8.format=hybrid: needs compute capability 8.9 or higher, and this GPU has 8.0"):
        plan("fp8.format=hybrid", gpu="a100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fp8.format=hybrid", "fp8.recipe=mxfp8"), "needs compute capability 10.x, and this GPU has 9.0; use fp8.recipe="),
        (("fp8.recipe=blockwise",), "is of FP8, and fp8.format=null"),
        (("fp8.format=hybrid", "model.dtype=float32"), "is of bfloat16 weights"),
        (("fp8.format=hybrid", "fp8.param_gather=true"), "is of the distributed optimizer"),
    ],
)
def test_what_training_in_fp8_would_be_refused_for_is_refused_in_its_plan(options, message):
    """Before it waits in a queue."""
    with pytest.raises(Refused, match=message):
        plan(*options)
    plan("fp8.format=hybrid", "fp8.recipe=mxfp8", gpu="b200")


FP8, OF_TWO_LAYERS = "fp8.format=hybrid", ["fp8.num_layers_at_start_in_bf16=1", "fp8.num_layers_at_end_in_bf16=1"]
A_LAYER = 3584 * ((28 + 2 * 4) * 128 + 28 * 128 + 3 * 18944)  # numbers in the products of one of DENSE's 28
OF_MOE = 2048 * ((32 + 2 * 4) * 128 + 32 * 128) + 2048 * 768 * 3 * 128 // 8  # and of one of MOE's 48 where ep=8


@pytest.mark.parametrize(
    ("hf", "gpu", "options", "added"),
    [
        (DENSE, "h100", [], [2 * 28 * A_LAYER]),
        (DENSE, "h100", ["fp8.recipe=blockwise"], [2 * (1 + 4 / 128**2) * 28 * A_LAYER]),
        (DENSE, "h100", [f"{TP}=2"], [28 * A_LAYER]),
        (DENSE, "h100", [f"{PP}=2", *OF_TWO_LAYERS], [2 * 13 * A_LAYER, 2 * 13 * A_LAYER]),
        (DENSE, "h100", [f"{PP}=2", f"{VPP}=7", "fp8.num_layers_at_start_in_bf16=3"], [2 * 12 * A_LAYER, 2 * 13 * A_LAYER]),
        (DENSE, "h100", [ZERO1, "fp8.param_gather=true"], [0]),
        (DENSE, "b200", [], [28 * A_LAYER]),
        (DENSE, "b200", [ZERO1, "fp8.recipe=delayed", "fp8.param_gather=true"], [-28 * A_LAYER]),
        (DENSE, "b200", ["fp8.recipe=mxfp8"], [2 * (1 + 1 / 32) * 28 * A_LAYER]),
        (MOE, "h100", [f"{EP}=8"], [2 * 48 * OF_MOE]),
    ],
)
def test_weights_in_fp8_are_held_beside_those_of_bfloat16(hf, gpu, options, added):
    without = [option for option in options if not option.startswith("fp8.")]
    found, before = plan(FP8, *options, hf=hf, gpu=gpu).stages, plan(*without, hf=hf, gpu=gpu).stages
    assert [one.parameters - other.parameters for one, other in zip(found, before, strict=True)] == pytest.approx(added)


def test_a_reference_has_one_copy_in_fp8_and_a_critic_both():
    of = "objective.name=sft_kl", "reference.placement=copy"
    assert plan(FP8, *of).stages[0].reference - plan(*of).stages[0].reference == pytest.approx(28 * A_LAYER)
    swap = "objective.name=sft_kl", "reference.placement=swap"
    assert plan(FP8, *swap).stages[0].reference == plan(*swap).stages[0].reference
    ppo = "objective.name=ppo", "data.kind=rollouts"
    critic = plan(FP8, *ppo).stages[0].critic - plan(*ppo).stages[0].critic
    assert critic == pytest.approx(2 * 28 * A_LAYER)


def test_the_first_stages_hold_more_microbatches():
    mesh = plan(f"{PP}=4").mesh
    assert [chunks_in_flight(mesh, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(mesh, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = dataclasses.replace(mesh, vpp=7)
    assert [chunks_in_flight(interleaved, stage, 16) for stage in range(4)] == [31, 29, 27, 25]


def test_the_bubble_is_that_of_the_schedule():
    options = f"{PP}=4", "train.batch_size=64", "data.pack_length=4096"
    found = plan(*options)
    assert found.work.microbatches == 32
    assert found.bubble == pytest.approx(3 / 35)
    busy = found.time.compute + found.time.communication
    assert found.time.bubble / (found.time.bubble + busy) == pytest.approx(3 / 35)
    assert plan(*options, f"{VPP}=7").bubble == pytest.approx((3 / 7) / (32 + 3 / 7))


def test_groups_that_span_machines_use_the_network():
    links = groups(plan(f"{TP}=2", f"{PP}=2", nodes=4).mesh, machines(nodes=4))
    assert {name: links[name].link for name in ("tensor", "data", "pipeline")} == {
        "tensor": "nvlink", "data": "network", "pipeline": "network",
    }  # fmt: skip
    assert (links["data"].size, links["data"].together) == (8, 4)
    near = groups(plan(f"{EP}=8", hf=MOE, nodes=4).mesh, machines(nodes=4))["expert"]
    far = groups(plan(f"{EP}=16", hf=MOE, nodes=4).mesh, machines(nodes=4))["expert"]
    assert near.exchanged(16.0) == {"nvlink": 14.0}
    assert far.exchanged(16.0) == {"nvlink": 7.0, "network": 8.0}


def test_gradients_hide_behind_the_last_backward_pass_only():
    last = f"{P}overlap_param_gather=false"
    slow, fast = (plan(ZERO1, f"{P}overlap_grad_reduce={overlap}", last, nodes=8) for overlap in ("false", "true"))
    sent = sum(one.seconds for one in slow.traffic if one.purpose.startswith("gradients"))
    assert slow.time.gradients - fast.time.gradients == pytest.approx(min(sent, slow.time.gradients), rel=0.5)
    assert fast.time.gradients > 0  # parameters are gathered afterwards
    assert plan(ZERO1, nodes=8).time.gradients < fast.time.gradients  # or behind the forward pass, as on GPUs by default


def test_an_old_policy_costs_a_pass_for_each_update_but_the_first():
    one, eight = (plan("objective.name=psft", f"train.minibatch_size={size}", "train.batch_size=256") for size in (256, 32))
    assert one.time.old_policy == 0
    assert eight.work.old_passes == 7
    assert 7 / 8 * 0.3 < eight.time.old_policy / eight.time.compute < 7 / 8 * 0.36  # a third of an update


def test_a_reference_costs_passes_and_a_place():
    options = "objective.name=dpo", "data.kind=preferences"
    swapped, copied = (plan(*options, f"reference.placement={where}") for where in ("swap", "copy"))
    assert (swapped.stages[0].reference, copied.stages[0].reference) == (0, copied.stages[0].parameters)
    assert swapped.time.reference > copied.time.reference > 0


def test_a_critic_is_a_second_model():
    found = plan("objective.name=ppo", "data.kind=rollouts")
    stage = found.stages[0]
    assert stage.critic == stage.parameters + stage.gradients + stage.optimizer
    assert found.time.critic > found.time.compute


def test_sampling_in_the_process_needs_room_for_keys_and_values():
    options = "objective.name=grpo", "data.kind=prompts", f"{TP}=2"
    small, large = (plan(*options, f"rollout.max_batch_size={size}") for size in (16, 32))
    assert large.stages[0].kv_cache == 2 * small.stages[0].kv_cache
    # 32 responses, 1.5 times 4096 tokens, 28 layers, key and value of half of 4 heads of 128, bfloat16
    assert large.stages[0].kv_cache == 32 * 1.5 * 4096 * 28 * 2 * 2 * 128 * 2
    assert small.time.rollouts > large.time.rollouts > 0
    assert plan(*options, "rollout.engine=sglang").stages[0].kv_cache == 0


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_kind_of_run_can_be_planned(path, tiny_models):
    hf = read_config(tiny_models("qwen3_moe" if "moe" in path.stem else "qwen3"))
    found = estimate(load_config(path), hf, machines(gpus=2))
    assert found.fits
    assert found.time.total > found.time.compute > 0


def test_proposals_fit_and_are_what_they_say():
    options = ["train.minibatch_size=32", "objective.name=psft", "data.pack_length=4096"]
    assert not plan(*options, hf=MOE).fits
    found = propose(config(*options), MOE, machines(), 5)
    assert len(found) == 5
    assert all(one.fits for one in found)
    assert [one.time.total for one in found] == sorted(one.time.total for one in found)
    again = plan(*options, *overrides(found[0].config.parallel), hf=MOE)
    assert again.time == found[0].time
    assert again.peak == found[0].peak
    assert propose(config(*options), MOE, machines(gpus=1), 5) == []


def test_a_hundred_and_twenty_eight_nodes_are_planned():
    found = propose(config("objective.name=psft", "train.minibatch_size=128"), MOE, machines(nodes=128), 3)
    assert [one.machines.world_size for one in found] == [1024] * 3
    assert all(one.mesh.dp <= 128 for one in found)


def test_the_shape_of_a_model_is_found_without_its_weights(tiny_models):
    file = FOLDER / "psft/qwen3-30b-a3b.yaml"
    assert shape_of_model(file, "elsewhere/Qwen3-30B-A3B-Instruct-2507") == MOE
    assert shape_of_model(file, str(tiny_models("qwen3"))).num_hidden_layers == 4
    assert shape_of_model(file, "elsewhere/unknown", tiny_models("qwen3")).num_hidden_layers == 4
    with pytest.raises(Refused, match="its shape is not known; give --model FOLDER.*Qwen3-4B-Base"):
        shape_of_model(file, "elsewhere/unknown")
    with pytest.raises(Refused, match="names no model"):
        shape_of_model(file, "")
