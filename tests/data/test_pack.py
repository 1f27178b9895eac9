"""What is trained does not depend on the split. Not tested here: plans (test_plan), and the model that reads the packs."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from megapsft.data.loss_weights import AGGREGATIONS, loss_weights
from megapsft.data.pack import Layout, pack, zigzag
from megapsft.types import Sample, TrainBatch

PAD = 7
SLICED = ("token_ids", "labels", "position_ids", "loss_mask", "loss_weights", "sample_ids")
EVERY_LAYOUT = [
    Layout(
        packing=packing,
        pack_length=pack_length,
        micro_batch_size=3,
        data_parallel_size=dp,
        context_parallel_size=cp,
        tensor_parallel_size=2,
        sequence_parallel=sequence_parallel,
        microbatch_multiple=multiple,
        equal_lengths=equal,
    )
    for packing, pack_length, dp, cp, sequence_parallel, multiple, equal in itertools.product(
        (True, False), (10, 150), (1, 3), (1, 2, 3), (False, True), (1, 2), (False, True)
    )
]
LAYOUTS = random.Random(0).sample(EVERY_LAYOUT, 30)
SINGLE = Layout(packing=False, pack_length=1, micro_batch_size=1)


def make_samples(count: int, seed: int) -> list[Sample]:
    """Masks of every kind: prompt and response, holes, nothing trained, and a first token that nothing predicts."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        n = int(rng.integers(1, 60))
        mask = [np.arange(n) >= n // 2, rng.random(n) < 0.5, np.zeros(n, bool), np.ones(n, bool)][i % 4]
        samples.append(Sample(token_ids=rng.integers(10, 1000, n).astype(np.int32), loss_mask=mask, source=f"rows:{i + 1}"))
    return samples


SAMPLES = make_samples(29, seed=0)


def ranks(layout: Layout) -> list[Layout]:
    """`layout` as each rank has it."""
    return [
        dataclasses.replace(layout, data_parallel_rank=dp, context_parallel_rank=cp)
        for dp in range(layout.data_parallel_size)
        for cp in range(layout.context_parallel_size)
    ]


def pack_for(layout: Layout, samples=SAMPLES, minibatch_size=12, aggregation="token-mean", **options) -> TrainBatch:
    groups = [(sample,) for sample in samples]
    return pack(groups, minibatch_size=minibatch_size, layout=layout, aggregation=aggregation, pad_token_id=PAD, **options)


def real_positions(batches: list[TrainBatch]) -> dict[tuple, tuple]:
    """(minibatch, sample, position in it) -> what stands there, over all ranks; a position may be held once only."""
    found = {}
    for batch in batches:
        for number, minibatch in enumerate(batch.minibatches):
            for micro in minibatch.microbatches:
                columns = [getattr(micro, name)[micro.sample_ids >= 0].tolist() for name in SLICED]
                for token, label, position, mask, weight, sample in zip(*columns, strict=True):
                    assert (number, sample, position) not in found
                    found[number, sample, position] = (token, label, mask, weight)
    return found


def label(layout: Layout) -> str:
    shape = f"dp{layout.data_parallel_size}-cp{layout.context_parallel_size}-x{layout.microbatch_multiple}"
    kind = f"packed{layout.pack_length}" if layout.packing else "rows"
    return "-".join([kind, shape] + ["sp"] * layout.sequence_parallel + ["equal"] * layout.equal_lengths)


@pytest.fixture(params=LAYOUTS, ids=label)
def layout(request) -> Layout:
    return request.param


def microbatches(layout: Layout):
    for rank in ranks(layout):
        for minibatch in pack_for(rank).minibatches:
            yield from minibatch.microbatches


def test_ranks_together_hold_exactly_the_single_rank_plan(layout):
    assert real_positions([pack_for(rank) for rank in ranks(layout)]) == real_positions([pack_for(SINGLE)])


def test_experts_of_an_engine_stand_at_their_tokens(layout):
    """Of some samples; -1 at all other tokens and at padding."""
    rng = np.random.default_rng(1)
    samples = [
        dataclasses.replace(s, routed_experts=rng.integers(0, 99, (len(s), 3, 2)).astype(np.int16)) if i % 3 else s
        for i, s in enumerate(SAMPLES)
    ]
    held = 0
    for rank in ranks(layout):
        for number, minibatch in enumerate(pack_for(rank, samples).minibatches):
            for micro in minibatch.microbatches:
                assert micro.rollout_routing.shape == (*micro.token_ids.shape, 3, 2)
                assert torch.all(micro.rollout_routing[micro.sample_ids < 0] == -1)
                for row, place in (micro.sample_ids >= 0).nonzero().tolist():
                    sample = samples[12 * number + int(micro.sample_ids[row, place])]
                    expected = -1 if sample.routed_experts is None else sample.routed_experts[micro.position_ids[row, place]]
                    assert np.array_equal(micro.rollout_routing[row, place], np.broadcast_to(expected, (3, 2)))
                    held += 1
    assert held == sum(map(len, samples))
    assert all(micro.rollout_routing is None for micro in microbatches(layout))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_do_not_depend_on_the_split(aggregation):
    expected = real_positions([pack_for(SINGLE, aggregation=aggregation, max_response_length=60)])
    for layout in LAYOUTS[::3]:
        found = [pack_for(rank, aggregation=aggregation, max_response_length=60) for rank in ranks(layout)]
        assert real_positions(found) == expected


def test_padding_is_masked_and_weighs_nothing(layout):
    for micro in microbatches(layout):
        padding = micro.sample_ids < 0
        assert torch.all(micro.token_ids[padding] == PAD)
        assert not micro.loss_mask[padding].any()
        assert torch.all(micro.labels[~micro.loss_mask] == 0)
        assert torch.all(micro.loss_weights[~micro.loss_mask] == 0)


def test_totals_are_those_of_all_ranks(layout):
    batches = [pack_for(rank) for rank in ranks(layout)]
    for number, minibatch in enumerate(batches[0].minibatches):
        parts = [micro for batch in batches for micro in batch.minibatches[number].microbatches]
        assert minibatch.trained_tokens == sum(int(micro.loss_mask.sum()) for micro in parts)
        assert minibatch.real_tokens == sum(int((micro.sample_ids >= 0).sum()) for micro in parts)
        assert minibatch.forward_tokens == sum(micro.token_ids.numel() for micro in parts)
        assert minibatch.samples == len({i for micro in parts for i in micro.sample_ids.unique().tolist()} - {-1})
        for batch in batches:
            other = batch.minibatches[number]
            assert dataclasses.replace(other, microbatches=()) == dataclasses.replace(minibatch, microbatches=())


def test_shapes_and_dtypes(layout):
    for micro in microbatches(layout):
        assert {getattr(micro, name).shape for name in SLICED} == {micro.token_ids.shape}
        assert [getattr(micro, name).dtype for name in SLICED] == [
            torch.int64, torch.int64, torch.int64, torch.bool, torch.float32, torch.int64,
        ]  # fmt: skip
        assert all(getattr(micro, name).is_contiguous() for name in SLICED)
        assert (micro.cu_seqlens is not None) == layout.packing
        if layout.sequence_parallel:
            assert micro.token_ids.shape[1] % layout.tensor_parallel_size == 0


def test_cu_seqlens_bound_whole_sequences(layout):
    """Each sequence of a pack is one sample from its start with its padding, or padding only; CP can cut each."""
    if not layout.packing:
        assert all(micro.cu_seqlens is None for micro in microbatches(layout))
        return
    for micro in microbatches(layout):
        assert micro.cu_seqlens.dtype == torch.int32
        bounds = micro.cu_seqlens.tolist()
        sequences = np.diff(bounds)
        assert bounds[0] == 0
        assert bounds[-1] == micro.token_ids.shape[1] * layout.context_parallel_size
        assert np.all(sequences > 0)
        assert np.all(sequences % layout.sequence_multiple == 0)
        assert micro.max_seqlen == max(sequences)
        for ids in torch.split(micro.sample_ids[0], (sequences // layout.context_parallel_size).tolist()):
            assert len({*ids.tolist()} - {-1}) <= 1


def test_context_parallel_slices_join_to_the_whole(layout):
    """Zigzag within every sequence where packed, over the row where not; positions count up from 0 in each."""
    size = layout.context_parallel_size
    for dp in range(layout.data_parallel_size):
        parts = [pack_for(r) for r in ranks(layout) if r.data_parallel_rank == dp]
        for minibatches in zip(*(part.minibatches for part in parts), strict=True):
            for micros in zip(*(minibatch.microbatches for minibatch in minibatches), strict=True):
                width = micros[0].token_ids.shape[1] * size
                bounds = micros[0].cu_seqlens.tolist() if layout.packing else [0, width]
                sequences = np.diff(bounds)
                joined = torch.full((len(micros[0].token_ids), width), -1)
                for rank, micro in enumerate(micros):
                    mine = np.concatenate([a + zigzag(n, rank, size) for a, n in zip(bounds, sequences, strict=False)])
                    joined[:, mine] = micro.position_ids
                expected = np.concatenate([np.arange(n) for n in sequences])
                assert torch.equal(joined, torch.from_numpy(expected).expand_as(joined))


def test_every_rank_runs_the_same_number_of_microbatches(layout):
    counts = {tuple(len(m.microbatches) for m in pack_for(rank).minibatches) for rank in ranks(layout)}
    assert len(counts) == 1


def test_minibatches_are_cut_in_order():
    batch = pack_for(SINGLE, minibatch_size=12)
    assert [minibatch.samples for minibatch in batch.minibatches] == [12, 12, 5]
    for start, minibatch in zip((0, 12, 24), batch.minibatches, strict=True):
        assert minibatch.real_tokens == sum(map(len, SAMPLES[start : start + 12]))


def test_weights_are_those_of_the_whole_minibatch():
    batch = pack_for(SINGLE, aggregation="seq-mean-token-mean")
    for start, minibatch in zip((0, 12, 24), batch.minibatches, strict=True):
        expected = loss_weights([s.loss_mask[1:] for s in SAMPLES[start : start + 12]], "seq-mean-token-mean")
        for i, micro in enumerate(minibatch.microbatches):
            assert micro.loss_weights[0, : len(expected[i])].tolist() == expected[i].astype(np.float32).tolist()


def test_token_mean_weights_sum_to_one_over_all_ranks(layout):
    batches = [pack_for(rank) for rank in ranks(layout)]
    for number in range(3):
        total = sum(m.loss_weights.double().sum() for batch in batches for m in batch.minibatches[number].microbatches)
        assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_trained_weighs_nothing(aggregation):
    samples = [dataclasses.replace(sample, loss_mask=np.zeros(len(sample), bool)) for sample in SAMPLES]
    batch = pack_for(SINGLE, samples, aggregation=aggregation, max_response_length=60)
    for minibatch in batch.minibatches:
        assert minibatch.trained_tokens == 0
        assert all(torch.all(micro.loss_weights == 0) for micro in minibatch.microbatches)


def test_a_small_pack_by_hand():
    samples = [
        Sample(token_ids=np.array([11, 12, 13], np.int32), loss_mask=np.array([False, True, True]), source=""),
        Sample(token_ids=np.array([21, 22, 23, 24, 25], np.int32), loss_mask=np.arange(5) > 2, source=""),
    ]
    layout = Layout(
        packing=True, pack_length=16, micro_batch_size=1, context_parallel_size=2, tensor_parallel_size=4, sequence_parallel=True
    )
    micro = pack_for(layout, samples).minibatches[0].microbatches[0]
    other = pack_for(dataclasses.replace(layout, context_parallel_rank=1), samples).minibatches[0].microbatches[0]
    assert micro.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert micro.max_seqlen == 8
    # the whole: 21 22 23 24 25 . . . | 11 12 13 . | . . . .
    assert micro.token_ids.tolist() == [[21, 22, PAD, PAD, 11, PAD, PAD, PAD]]
    assert other.token_ids.tolist() == [[23, 24, 25, PAD, 12, 13, PAD, PAD]]
    assert micro.labels.tolist() == [[0, 0, 0, 0, 12, 0, 0, 0]]
    assert other.labels.tolist() == [[24, 25, 0, 0, 13, 0, 0, 0]]
    assert other.position_ids.tolist() == [[2, 3, 4, 5, 1, 2, 1, 2]]
    assert other.sample_ids.tolist() == [[1, 1, 1, -1, 0, 0, -1, -1]]
    assert other.loss_weights.tolist() == [[0.25, 0.25, 0, 0, 0.25, 0, 0, 0]]


def test_a_rank_without_samples_computes_padding():
    layout = Layout(packing=True, pack_length=64, micro_batch_size=1, data_parallel_size=2, data_parallel_rank=1)
    (micro,) = pack_for(layout, SAMPLES[:1]).minibatches[0].microbatches
    assert micro.token_ids.tolist() == [[PAD]]
    assert micro.cu_seqlens.tolist() == [0, 1]
    assert micro.sample_ids.tolist() == [[-1]]


def test_no_samples_are_no_updates():
    assert pack_for(SINGLE, []).minibatches == ()


@pytest.mark.parametrize(("length", "size"), [(8, 2), (24, 3), (32, 4), (5, 1)])
def test_zigzag_ranks_share_a_sequence(length, size):
    parts = [zigzag(length, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == list(range(length))
    assert {len(part) for part in parts} == {length // size}
    assert len({int(part.sum()) for part in parts}) == 1  # early and late positions in balance


def test_zigzag_by_hand():
    assert zigzag(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag(8, 1, 2).tolist() == [2, 3, 4, 5]


def test_groups_are_cut_into_minibatches_whole():
    groups = [tuple(SAMPLES[:3]), (SAMPLES[3],), tuple(SAMPLES[4:6])]
    batch = pack(groups, minibatch_size=2, layout=SINGLE, aggregation="token-mean", pad_token_id=PAD)
    assert [minibatch.samples for minibatch in batch.minibatches] == [4, 2]


def test_sides_of_a_preference_share_a_microbatch(layout):
    """Whatever the split, and next to each other in the update: 2k and 2k + 1."""
    pairs = [tuple(SAMPLES[i : i + 2]) for i in range(0, 28, 2)]
    layout = dataclasses.replace(layout, micro_batch_size=4)
    seen = []
    for rank in ranks(layout):
        batch = pack(pairs, minibatch_size=7, layout=rank, aggregation="token-sum", pad_token_id=PAD, together=True)
        for number, minibatch in enumerate(batch.minibatches):
            for micro in minibatch.microbatches:
                assert micro.samples == 14
                here = {int(i) for i in micro.sample_ids.unique() if i >= 0}
                if layout.context_parallel_size == 1:  # a slice need not have a token of both
                    assert {i ^ 1 for i in here} == here
                    seen += [(number, i) for i in here]
    if layout.context_parallel_size == 1:
        assert sorted(seen) == [(number, i) for number in range(2) for i in range(14)]


def test_what_is_known_of_samples_reaches_every_token(layout):
    known = [
        dataclasses.replace(
            sample, reward=i / 10, advantage=-i / 10, demonstration=i % 3 == 0,
            rollout_logprobs=np.arange(len(sample), dtype=np.float32) + 100 * i,
        )
        for i, sample in enumerate(SAMPLES)
    ]  # fmt: skip
    for rank in ranks(layout):
        for minibatch in pack_for(rank, known, minibatch_size=len(known)).minibatches:
            for micro in minibatch.microbatches:
                there, ids = micro.sample_ids >= 0, micro.sample_ids.clamp(min=0)
                for values, factor in ((micro.rewards, 0.1), (micro.advantages, -0.1)):
                    torch.testing.assert_close(values, torch.where(there, ids * factor, 0).float())
                assert torch.equal(micro.demonstration, there & (ids % 3 == 0))
                trained = micro.loss_mask
                expected = (micro.position_ids + 1 + 100 * ids).float()  # of the token that the position predicts
                assert torch.equal(micro.rollout_logprobs[trained], expected[trained])
