"""Not tested here: that an even plan is a fast one."""

import itertools
import random

import numpy as np
import pytest

from megapsft.data.plan import Layout, best_fit_decreasing, plan_update, round_up

EVERY_LAYOUT = [
    Layout(
        packing=packing,
        pack_length=pack_length,
        micro_batch_size=3,
        data_parallel_size=dp,
        context_parallel_size=cp,
        tensor_parallel_size=4,
        sequence_parallel=sequence_parallel,
        microbatch_multiple=multiple,
        equal_lengths=equal,
        alignment=alignment,
    )
    for packing, pack_length, dp, cp, sequence_parallel, multiple, equal, alignment in itertools.product(
        (True, False), (10, 300), (1, 3, 4), (1, 2, 3), (False, True), (1, 4), (False, True), (1, 16)
    )
]
LAYOUTS = random.Random(0).sample(EVERY_LAYOUT, 40)
UPDATES = [np.random.default_rng(seed).integers(1, 120, size).tolist() for seed, size in enumerate((1, 2, 5, 13, 64))]


def label(layout: Layout) -> str:
    shape = f"dp{layout.data_parallel_size}-cp{layout.context_parallel_size}-x{layout.microbatch_multiple}"
    kind = f"packed{layout.pack_length}" if layout.packing else "rows"
    marks = {"sp": layout.sequence_parallel, "fp8": layout.alignment > 1, "equal": layout.equal_lengths}
    return "-".join([kind, shape, *(mark for mark, holds in marks.items() if holds)])


@pytest.fixture(params=LAYOUTS, ids=label)
def layout(request) -> Layout:
    return request.param


def packed_layout(**changes) -> Layout:
    return Layout(**{"packing": True, "pack_length": 1000, "micro_batch_size": 1} | changes)


def loads(plans, lengths) -> list[int]:
    """Tokens of each rank, padding aside."""
    return [sum(lengths[i] for plan in share for row in plan.rows for i in row) for share in plans]


def test_every_sample_is_planned_once(layout):
    for lengths in UPDATES:
        plans = plan_update(lengths, layout)
        placed = [i for share in plans for plan in share for row in plan.rows for i in row]
        assert sorted(placed) == list(range(len(lengths)))


def test_ranks_have_equally_many_microbatches(layout):
    for lengths in UPDATES:
        plans = plan_update(lengths, layout)
        assert len(plans) == layout.data_parallel_size
        assert len({len(share) for share in plans}) == 1
        assert len(plans[0]) % layout.microbatch_multiple == 0


def test_lengths_can_be_cut(layout):
    for plan in itertools.chain.from_iterable(itertools.chain.from_iterable(plan_update(n, layout) for n in UPDATES)):
        assert plan.length > 0
        assert plan.length % layout.length_multiple == 0
        slices = layout.context_parallel_size * (layout.tensor_parallel_size if layout.sequence_parallel else 1)
        assert plan.length % slices == plan.length // slices % layout.alignment == 0
        assert plan.length % layout.sequence_multiple == 0


def test_samples_fit_their_rows(layout):
    for lengths in UPDATES:
        for plan in itertools.chain.from_iterable(plan_update(lengths, layout)):
            for row in plan.rows:
                assert sum(round_up(lengths[i], layout.sequence_multiple) for i in row) <= plan.length
                assert layout.packing or len(row) <= 1
            assert len(plan.rows) == 1 or not layout.packing
            assert len(plan.rows) <= layout.micro_batch_size


def test_packs_hold_pack_length_or_the_longest_sample(layout):
    for lengths in UPDATES:
        most = max(layout.pack_length, round_up(max(lengths), layout.length_multiple))
        for plan in itertools.chain.from_iterable(plan_update(lengths, layout)):
            assert plan.length <= most


def test_equal_lengths(layout):
    for lengths in UPDATES:
        shapes = {(len(plan.rows), plan.length) for share in plan_update(lengths, layout) for plan in share}
        assert len(shapes) == 1 or not layout.equal_lengths


def test_no_rank_is_idle_where_samples_suffice(layout):
    for lengths in UPDATES:
        if len(lengths) >= layout.data_parallel_size:
            assert min(loads(plan_update(lengths, layout), lengths)) > 0


def test_no_more_microbatches_than_needed(layout):
    """Unpacked: what micro_batch_size asks for, rounded up to what the ranks need."""
    for lengths in UPDATES:
        plans = plan_update(lengths, layout)
        if not layout.packing:
            assert sum(map(len, plans)) == round_up(-(-len(lengths) // layout.micro_batch_size), layout.count_multiple)


def test_a_plan_depends_on_nothing_but_its_arguments(layout):
    for lengths in UPDATES:
        assert plan_update(lengths, layout) == plan_update(list(lengths), layout)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_packed_ranks_carry_about_the_same(size):
    lengths = np.random.default_rng(0).integers(50, 400, 256).tolist()
    tokens = loads(plan_update(lengths, packed_layout(data_parallel_size=size)), lengths)
    assert max(tokens) <= 1.02 * min(tokens)


def test_packs_are_nearly_full():
    """28 packs are the fewest that could hold the samples."""
    lengths = np.random.default_rng(1).integers(50, 400, 120).tolist()
    assert -(-sum(lengths) // 1000) == 28
    assert len(plan_update(lengths, packed_layout())[0]) == 28


def test_work_is_spread_although_one_pack_would_hold_it_all():
    plans = plan_update([10, 20, 30, 40], packed_layout(data_parallel_size=2))
    assert [len(share) for share in plans] == [1, 1]
    assert loads(plans, [10, 20, 30, 40]) == [50, 50]


def test_uneven_packs_go_to_and_fro_over_the_ranks():
    plans = plan_update([40, 30, 20, 10], packed_layout(pack_length=40, data_parallel_size=2))
    assert [[plan.length for plan in share] for share in plans] == [[40, 10], [30, 20]]


def test_a_pack_is_not_padded_beyond_pack_length():
    """5 + 4 fit into 10, but 9 would be padded to 12."""
    plans = plan_update([5, 4], packed_layout(pack_length=10, tensor_parallel_size=4, sequence_parallel=True))
    assert [plan.length for plan in plans[0]] == [8, 4]


def test_short_samples_are_spread_beside_a_long_one():
    plans = plan_update([900, 10, 10, 10], packed_layout(data_parallel_size=4))
    assert [[plan.rows for plan in share] for share in plans] == [[((0,),)], [((1,),)], [((2,),)], [((3,),)]]


def test_too_few_samples_leave_padding_of_the_least_length():
    layout = packed_layout(data_parallel_size=3, context_parallel_size=2, tensor_parallel_size=2, sequence_parallel=True)
    plans = plan_update([17], layout)
    assert [[(plan.rows, plan.length) for plan in share] for share in plans] == [[(((0,),), 24)], [(((),), 8)], [(((),), 8)]]


def test_rows_are_dealt_in_order():
    layout = Layout(packing=False, pack_length=1, micro_batch_size=2, data_parallel_size=2)
    plans = plan_update([5, 3, 4, 9, 1, 2, 8, 6], layout)
    assert [[plan.rows for plan in share] for share in plans] == [
        [((0,), (1,)), ((4,), (5,))],
        [((2,), (3,)), ((6,), (7,))],
    ]
    assert [[plan.length for plan in share] for share in plans] == [[5, 2], [9, 8]]


def test_short_row_groups_are_filled_up_where_lengths_are_equal():
    layout = Layout(packing=False, pack_length=1, micro_batch_size=4, equal_lengths=True)
    plans = plan_update([5, 3, 4, 9, 1], layout)
    assert [plan.rows for plan in plans[0]] == [((0,), (1,), (2,)), ((3,), (4,), ())]


def test_best_fit_decreasing_takes_the_fullest_bin_with_room():
    assert best_fit_decreasing([4, 7, 3, 6], capacity=10) == [[1, 2], [3, 0]]
    assert best_fit_decreasing([6, 6, 4, 4], capacity=10) == [[0, 2], [1, 3]]
