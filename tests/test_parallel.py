"""The arithmetic of a split. What is refused is in tests/test_errors.py, groups of ranks in tests/invariants."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megapsft.config import ParallelConfig
from megapsft.errors import Refused
from megapsft.parallel import Mesh, ModelShape, plan_mesh, smallest_world, with_overlap

DENSE = ModelShape(num_layers=24, num_attention_heads=16, num_query_groups=8, ffn_hidden_size=1024)
MOE = dataclasses.replace(DENSE, num_experts=16)


def config(tp=1, pp=1, vpp=None, cp=1, ep=1, etp=None, **options) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, **options,
    )  # fmt: skip


def mesh(world: int, shape: ModelShape = DENSE, **sizes) -> Mesh:
    return plan_mesh(config(**sizes), world, shape, on_cuda=True)


@pytest.mark.parametrize(
    ("sizes", "fewest"),
    [
        ({}, 1),
        ({"tp": 2}, 2),
        ({"tp": 2, "pp": 3}, 6),
        ({"tp": 2, "pp": 2, "vpp": 3}, 4),
        ({"tp": 2, "cp": 2}, 4),
        ({"ep": 4}, 4),
        ({"tp": 2, "ep": 4, "etp": 1}, 4),
        ({"tp": 2, "ep": 4}, 8),  # expert tensor parallelism is tensor parallelism where nothing is said
        ({"tp": 2, "cp": 3, "ep": 4, "etp": 1}, 12),  # experts fold over dense ranks: neither 6 nor 4 divides the other
        ({"tp": 4, "cp": 2, "ep": 4, "etp": 1, "pp": 2}, 16),
    ],
)
def test_smallest_world(sizes, fewest):
    assert smallest_world(config(**sizes)) == fewest


def test_smallest_world_is_the_smallest_that_fits():
    for tp, pp, cp, ep, etp in itertools.product((1, 2, 4), (1, 2), (1, 3), (1, 2, 4), (None, 1, 2)):
        if ep == 1 and etp not in (None, tp):
            continue
        split = config(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
        fewest = smallest_world(split)
        for world in (fewest, 3 * fewest):
            assert plan_mesh(split, world, MOE, on_cuda=True).dp == world // (tp * pp * cp)
        for world in range(1, fewest):
            with pytest.raises(Refused, match=f"^world size {world}: "):
                plan_mesh(split, world, MOE, on_cuda=True)


def test_data_parallelism_is_what_is_left():
    assert mesh(24, tp=2, pp=3, cp=2).dp == 2
    assert mesh(16, MOE, tp=2, ep=8, etp=1).dp == 8
    assert mesh(5).dp == 5


@pytest.mark.parametrize(
    ("options", "on_gpus", "swapped", "expected"),
    [
        (dict(use_distributed_optimizer=True), True, False, (True, True)),
        (dict(use_distributed_optimizer=True), True, True, (True, False)),
        (dict(use_distributed_optimizer=True), False, False, (False, False)),
        (dict(), True, False, (False, False)),
        (dict(use_distributed_optimizer=True, overlap_grad_reduce=False), True, False, (False, False)),
        (dict(use_distributed_optimizer=True, overlap_param_gather=False), True, False, (True, False)),
        (dict(overlap_grad_reduce=True), False, False, (True, False)),
    ],
)
def test_communication_is_hidden_where_it_can_be_and_nobody_says_otherwise(options, on_gpus, swapped, expected):
    found = with_overlap(ParallelConfig(**options), on_gpus, swapped)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == expected


def test_defaults_of_a_split():
    plain = mesh(1)
    assert (plain.tp, plain.pp, plain.vpp, plain.cp, plain.ep, plain.etp, plain.dp) == (1,) * 7
    assert (plain.sequence_parallel, plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, False, True)
    assert mesh(8, MOE, tp=2, ep=4).etp == 2


def test_virtual_stages_do_not_batch_their_transfers():
    staged = mesh(4, pp=4, vpp=3)
    assert (staged.overlap_p2p_comm, staged.batch_p2p_comm) == (True, False)
    assert (mesh(4, pp=4).overlap_p2p_comm, mesh(4, pp=4).batch_p2p_comm) == (False, True)
    asked = mesh(4, pp=4, overlap_p2p_comm=True)
    assert (asked.overlap_p2p_comm, asked.batch_p2p_comm) == (True, False)


def test_sequence_parallelism_is_on_where_experts_need_it():
    assert mesh(2, MOE, tp=2).sequence_parallel
    assert not mesh(2, tp=2).sequence_parallel
    assert mesh(2, tp=2, sequence_parallel=True).sequence_parallel
    assert not mesh(2, MOE, ep=2).sequence_parallel


def test_remedies_are_remedies():
    """What is suggested is not refused in its turn: 4 divides the 4 heads, but not the 2 key-value heads."""
    narrow = dataclasses.replace(DENSE, num_attention_heads=4, num_query_groups=2)
    with pytest.raises(Refused) as caught:
        mesh(8, narrow, tp=8)
    assert caught.value.remedy == "use 1, 2"
    for tp in (1, 2):
        mesh(8, narrow, tp=tp)


def test_the_model_is_checked_before_the_world():
    with pytest.raises(Refused, match="must divide num_attention_heads=16"):
        mesh(1, tp=3)


@pytest.mark.parametrize(
    ("world", "shape", "sizes", "text"),
    [
        (1, DENSE, {}, "dp=1"),
        (8, DENSE, {"tp": 2, "pp": 2}, "tp=2 pp=2 dp=2"),
        (8, DENSE, {"tp": 2, "sequence_parallel": True, "cp": 2}, "tp=2 cp=2 dp=2 sp"),
        (4, DENSE, {"pp": 4, "vpp": 3}, "pp=4 vpp=3 dp=1"),
        (8, MOE, {"tp": 2, "ep": 4}, "tp=2 ep=4 dp=4 sp"),
        (8, MOE, {"tp": 2, "ep": 4, "etp": 1}, "tp=2 ep=4 etp=1 dp=4 sp"),
    ],
)
def test_describe_names_what_is_not_as_usual(world, shape, sizes, text):
    assert mesh(world, shape, **sizes).describe() == text


def test_meshes_that_differ_are_described_differently():
    """A checkpoint gives random states back to the ranks of the mesh that is described alike."""
    seen = {}
    for tp, pp, cp, ep, etp, world in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2, 4), (None, 1, 2), (32, 64)):
        if ep == 1 and etp not in (None, tp):
            continue
        one = mesh(world, MOE, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
        assert seen.setdefault(one.describe(), one) == one
