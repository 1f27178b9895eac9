"""The noise floor, measured on real ranks: what is exactly 1, what replay is worth, and whose fault noise is.

Not here: a device that is not deterministic, but for how it is reported; Transformer Engine.
"""

from __future__ import annotations

import dataclasses
import io
import os

import numpy as np
import pytest
from rich.console import Console

from megapsft.config import load_config
from megapsft.data.arithmetic import generate, preferences, rollouts, write_jsonl
from megapsft.errors import Refused
from megapsft.parallel import initialize, shutdown
from megapsft.report.probe import QUANTITIES, at_the_gate, precision_table, probe_table, tail, verdict
from megapsft.train.noise import Row
from megapsft.train.plan import plan_run
from megapsft.train.precision import name_of
from megapsft.train.probe import FEATURES, Probe, changed, first_groups, is_on, measure_noise
from tests.ranks import run_ranks

COLUMNS = ("data.columns.prompt=question", "data.columns.demonstration=answer")
TP2 = "parallel.tensor_model_parallel_size=2"
EP2 = ("parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1")
PP2 = "parallel.pipeline_model_parallel_size=2"
MERGED = "train.no_grad_microbatches"


def plan_of(model, data, *more, world=1):
    options = [f"model.path={model}", f"data.path={data}", "train.batch_size=16", "data.pack_length=512", *more]
    return plan_run(load_config(None, options), world)


def measure(model, data, *more, samples=None) -> Probe:
    plan = plan_of(model, data, *more, world=int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, plan.config.parallel, seed=1)
    probe = measure_noise(plan, samples)
    shutdown()
    return probe


@pytest.fixture(scope="module")
def one_rank(scaled, tiny_data) -> Probe:
    """The mixture of experts in bf16, packed, on one rank."""
    return run_ranks(1, measure, scaled, tiny_data, *COLUMNS)[0]


def row(probe: Probe, kind: str, title: str, replayed: bool | None = None) -> Row:
    (found,) = [r for r in probe.rows if (r.kind, r.title, r.replayed) == (kind, title, replayed)]
    return found


def test_replay_lowers_the_floor_against_an_old_pass_in_float32(one_rank):
    free, replayed = (row(one_rank, "not shared", "in float32", replay) for replay in (False, True))
    floor, with_replay = one_rank.floor(free), one_rank.floor(replayed)
    assert floor.mean > 2 * with_replay.mean > 0
    assert floor.quantiles[0.99] > 4 * with_replay.quantiles[0.99]
    assert floor.clipped > 0.002 > with_replay.clipped  # 0.004 or 0.006, as the processor rounds
    assert 0.005 < free.flipped < 0.5
    assert replayed.flipped == 0
    assert floor.differ > 0.9


def test_the_training_pass_has_the_bits_of_the_old_pass(one_rank):
    assert [(r.kind, r.replayed) for r in one_rank.rows[:2]] == [("configured", False), ("configured", True)]
    for one in one_rank.rows[:2]:
        assert not one.log_ratios.any()
        assert one.flipped == 0
    assert not [r for r in one_rank.rows if r.kind in ("repeated", "removed")]
    assert one_rank.cause() is None
    assert row(one_rank, "not shared", "unpacked", False).flipped is None  # tokens lie elsewhere
    text = verdict(one_rank)
    assert text.startswith("The training pass has the bits of the old pass: ratios are exactly 1 on ")
    assert f" {trained(one_rank):,} tokens; " in text
    assert "with the old pass in float32" in text
    assert ", with routing replay " in text
    assert one_rank.notes == ()


def test_bfloat16_beside_float32(one_rank):
    (precision,) = one_rank.precisions
    assert (precision.name, precision.finer) == ("bfloat16", "float32")
    assert {len(getattr(precision, field)) for field in QUANTITIES} == {trained(one_rank)}
    assert np.array_equal(precision.logprob, np.abs(row(one_rank, "not shared", "in float32", False).log_ratios))
    assert 2**-10 < np.median(precision.logits_rms) < 2**-4  # a few roundings of 2^-9 each, in every layer
    assert 0 <= precision.kl.min() < np.median(precision.kl) < precision.kl.max()
    assert precision.logprob.mean() ** 2 < 10 * precision.kl.mean()  # both are of the second order in the logits' error
    assert 0.8 < precision.same_top < 1
    text = printed(precision_table, precision)
    assert "bfloat16 beside float32" in text
    assert "…" not in text


def trained(probe: Probe) -> int:
    return len(probe.rows[0].log_ratios)


@pytest.mark.parametrize(
    "more",
    [[TP2], [*EP2], [PP2, "parallel.recompute_granularity=full", "model.moe_routing_replay=true"], []],
    ids=["tp2", "ep2", "pp2", "dp2"],
)
def test_on_two_ranks(more, one_rank, scaled, tiny_data):
    """Exactly 1 here too; against float32, noise of the size that it has on one rank, and the same report on both."""
    first, second = run_ranks(2, measure, scaled, tiny_data, *COLUMNS, *more)
    assert not any(r.log_ratios.any() for r in first.rows if r.kind == "configured")
    assert first.rows[0].replayed is ("model.moe_routing_replay=true" in more)
    for ours, theirs in zip(first.rows, second.rows, strict=True):
        assert np.array_equal(ours.log_ratios, theirs.log_ratios)
        assert ours.flipped == theirs.flipped
    for ours, theirs, alone in zip(first.precisions, second.precisions, one_rank.precisions, strict=True):
        for field in QUANTITIES:
            assert np.array_equal(getattr(ours, field), getattr(theirs, field))
            rel = 0.6 if field == "kl" else 0.3  # of the second order in the others
            assert np.median(getattr(ours, field)) == pytest.approx(np.median(getattr(alone, field)), rel=rel), field
    assert trained(first) == trained(one_rank)
    here, there = (row(probe, "not shared", "in float32", False) for probe in (first, one_rank))
    assert here.flipped == pytest.approx(there.flipped, rel=0.3)
    assert first.floor(here).mean == pytest.approx(one_rank.floor(there).mean, rel=0.3)
    if PP2 in more:
        assert not row(first, "not shared", "not recomputed", False).log_ratios.any()


def test_unpacked_rows_have_the_same_noise_on_one_rank_and_on_two(scaled, tiny_data):
    """A sample alone in its microbatch is computed alike wherever it is; in a pack its neighbours depend on the split."""
    unpacked = (*COLUMNS, "data.packing=false")
    (alone,), (first, _) = (run_ranks(world, measure, scaled, tiny_data, *unpacked) for world in (1, 2))
    assert [r.title for r in alone.rows] == ["as configured"] * 2 + ["in float32"] * 2
    for one, other in zip(alone.rows, first.rows, strict=True):
        np.testing.assert_allclose(other.log_ratios, one.log_ratios, rtol=1e-6, atol=1e-9)
        assert other.flipped == one.flipped
    for one, other in zip(alone.precisions, first.precisions, strict=True):
        for field in QUANTITIES:
            np.testing.assert_allclose(getattr(other, field), getattr(one, field), rtol=1e-6, atol=1e-9)
        assert other.same_top == one.same_top


def test_merged_packs_are_named_as_the_cause(scaled, tiny_data):
    """Few tokens an expert in a pack, many in eight of them: products of matrices of other shapes round otherwise."""
    options = ("model.dtype=float32", f"{MERGED}=8", "data.pack_length=128")
    (probe,) = run_ranks(1, measure, scaled, tiny_data, *COLUMNS, *options)
    floor = probe.floor(probe.rows[0])
    assert 0 < floor.mean < 1e-5
    assert floor.clipped == 0
    assert [r.feature for r in probe.rows if r.kind == "removed"] == [MERGED, "model.moe_routing_replay", "data.packing"]
    assert not row(probe, "removed", "single packs", False).log_ratios.any()
    assert probe.cause().key == MERGED
    assert verdict(probe).startswith(f"Noise alone clips 0% of {trained(probe):,} tokens")
    assert verdict(probe).endswith(f"the cause is that the old pass takes several packs as one; remedy: {MERGED}=1.")
    (merged, _) = (r for r in probe.rows if r.kind == "not shared" and r.feature == MERGED)
    assert np.array_equal(merged.log_ratios, probe.rows[0].log_ratios)


def test_a_dense_model_has_no_replay(tiny_models, tiny_data):
    (probe,) = run_ranks(1, measure, tiny_models("qwen3"), tiny_data, *COLUMNS, "parallel.recompute_granularity=full")
    assert {r.replayed for r in probe.rows} == {None}
    assert [r.title for r in probe.rows] == ["as configured", "2 packs as one", "not recomputed", "unpacked", "in float32"]
    assert 1e-5 < probe.floor(probe.rows[-1]).mean < 1e-2
    text = printed(probe_table, probe)
    assert "flips" not in text
    assert "replay" not in text + verdict(probe)


def printed(table, of, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(of))
    return console.file.getvalue()


def test_the_table_fits_80_columns(one_rank):
    text = printed(probe_table, one_rank)
    assert "…" not in text
    assert f"{trained(one_rank):,} tokens; clip range 0 to 1.28" in text
    assert "flips" in text


def test_an_objective_without_an_old_policy_and_pairs(tiny_models, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preferences(generate(16, 0), 0))
    options = ["objective.name=dpo", "data.kind=preferences", "train.batch_size=4", "model.dtype=float32"]
    (probe,) = run_ranks(1, measure, tiny_models("qwen3"), tmp_path / "pairs.jsonl", *options)
    assert probe.notes == ("objective.name=dpo has no old policy: probed as if it were psft.",)
    assert (probe.clip_low, probe.clip_high) == (None, 0.28)
    assert not probe.rows[0].log_ratios.any()
    assert np.abs(row(probe, "not shared", "unpacked").log_ratios).max() < 1e-4  # both passes mean the same tokens


def test_a_ratio_of_samples_is_probed_by_samples(tiny_models, tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", rollouts(generate(16, 0), 0, 4))
    options = ["objective.name=gspo", "data.kind=rollouts", "train.batch_size=4", "train.minibatch_size=2"]
    (probe,) = run_ranks(1, measure, tiny_models("qwen3"), tmp_path / "rollouts.jsonl", *options)
    assert (probe.unit, trained(probe)) == ("samples", 8)
    assert (probe.clip_low, probe.clip_high) == (3e-4, 4e-4)
    (tokens,) = run_ranks(
        1, measure, tiny_models("qwen3"), tmp_path / "rollouts.jsonl", *["objective.name=grpo", *options[1:]]
    )
    ratio = row(probe, "not shared", "in float32").log_ratios
    means = row(tokens, "not shared", "in float32").log_ratios
    assert trained(tokens) > 100
    assert 0 < np.abs(ratio).mean() < np.abs(means).mean()  # noise of tokens cancels in the mean of a sample


def test_samples_of_several_updates(tiny_models, tiny_data):
    more = (*COLUMNS, "train.minibatch_size=4", "model.dtype=float32", "data.packing=false")
    (few,), (many,) = (run_ranks(1, function, tiny_models("qwen3"), tiny_data, *more) for function in (measure, _twelve))
    plan = plan_of(tiny_models("qwen3"), tiny_data, *more)
    counts = [sum(int(s.loss_mask[1:].sum()) for g in first_groups(plan, samples) for s in g) for samples in (None, 12)]
    assert [trained(few), trained(many)] == counts
    assert few.notes == ("The training pass has no feature that an old pass could lack.",)
    assert few.precisions == ()
    assert (few.limit, at_the_gate(dataclasses.replace(few, limit=0.001))) == (
        None, "Training would begin: train.max_noise_clipped is 0.1%.",
    )  # fmt: skip


def _twelve(*arguments) -> Probe:
    return measure(*arguments, samples=12)


@pytest.mark.parametrize("samples", [0, 65])
def test_a_number_of_samples_that_cannot_be(samples, tiny_models, tiny_data):
    with pytest.raises(Refused, match=rf"--samples {samples}: must be 1 to 64, the rows of .*; leave it out"):
        first_groups(plan_of(tiny_models("qwen3"), tiny_data, *COLUMNS), samples)


def test_nothing_to_compare(tiny_models, tiny_data):
    plan = plan_of(tiny_models("qwen3"), tiny_data, *COLUMNS)
    masked = tuple((dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)),) for (s,) in plan.data.groups)
    plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, groups=masked))
    with pytest.raises(Refused, match="have no trained token: there is nothing to compare"):
        first_groups(plan, 2)


def made_up(*rows: Row) -> Probe:
    return Probe(rows=rows, clip_low=0.5, clip_high=0.28, unit="tokens", notes=())


FAR = np.log([1.0, 1.1, 1.27, 1.29, 0.49])
NOISE = Row(kind="configured", title="as configured", log_ratios=FAR)


def removed(feature: str, scale: float) -> Row:
    return Row(kind="removed", title=feature, feature=feature, log_ratios=FAR * scale)


def test_a_floor_in_numbers():
    floor = made_up(NOISE).floor(NOISE)
    assert floor.differ == 0.8
    assert floor.mean == pytest.approx(np.abs(FAR).mean())
    assert floor.quantiles[0.5] == pytest.approx(0.27)
    assert floor.largest == pytest.approx(0.51)
    assert floor.clipped == 0.4  # 1.29 above, 0.49 below


def test_what_training_would_say():
    probe = dataclasses.replace(made_up(NOISE), limit=0.3)
    assert at_the_gate(probe) == "Training would be refused: train.max_noise_clipped is 30%."
    assert at_the_gate(dataclasses.replace(probe, limit=0.4)).startswith("Training would begin")


def test_fp8_is_a_feature_beside_the_dtype(tiny_models, tiny_data):
    """What it would be compared with: bfloat16, and float32 without it. Here it cannot be computed."""
    plan = plan_of(tiny_models("qwen3"), tiny_data, *COLUMNS)
    eight = changed(plan, "fp8.format", "hybrid")
    assert [feature.without for feature in FEATURES if is_on(eight, feature)] == ["unpacked", "in bfloat16", "in float32"]
    assert name_of(eight.config) == "FP8 (hybrid, tensorwise)"
    assert changed(eight, "fp8.format", None).config == plan.config
    single = changed(eight, "model.dtype", "float32").config
    assert (single.fp8.format, name_of(single)) == (None, "float32")


def test_the_cause_is_what_lowers_the_floor_most():
    probe = made_up(NOISE, removed("data.packing", 0.4), removed("model.dtype", 0.1))
    assert verdict(probe).endswith("the cause is the rounding of bfloat16; remedy: model.dtype=float32.")
    equal = made_up(NOISE, removed("data.packing", 0.0), removed(MERGED, 0.0))
    assert equal.cause().key == MERGED  # what costs least
    recompute = made_up(NOISE, removed("parallel.recompute_granularity", 0.0))
    assert recompute.cause().remedy == "parallel.recompute_granularity=null"


def test_noise_that_nothing_explains():
    probe = made_up(NOISE, removed("data.packing", 0.9))
    assert verdict(probe).endswith("no feature turned off by itself halves it.")
    again = Row(kind="repeated", title="training twice", log_ratios=FAR)
    probe = made_up(NOISE, again, removed("data.packing", 0.9))
    assert "the cause is the device" in verdict(probe)
    assert "training twice" in printed(probe_table, probe)


def test_the_tail_that_is_drawn():
    x, share = tail(np.array([0.0, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(x, [0.5, 1.0, 2.0])
    np.testing.assert_allclose(share, [0.75, 0.5, 0.25])
    assert len(tail(np.zeros(3))[0]) == 0
    x, share = tail(np.linspace(0, 1, 100_000))
    assert len(x) <= 400
    assert share[-1] == pytest.approx(1e-5)
