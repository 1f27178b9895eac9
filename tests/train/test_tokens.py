"""What is recorded of tokens: the same for every split, the same for a run that was killed, and nothing changed by it.

Not here: CUDA, where counting must not wait for the device.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from megapsft.checkpoint.dist import latest
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.objectives.psft import PSFT
from megapsft.parallel import initialize, shutdown
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start
from megapsft.train.token_rows import COLUMNS, token_record
from megapsft.train.tokens import Tokens, forget_tokens
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch
from tests.ranks import run_ranks

STEPS, UPDATES = 3, 2  # of a step


def options(model, data, folder, *more) -> list[str]:
    """Batches of 32 of 64 rows: the third step begins the second epoch. The rate is so large that ratios reach the clip."""
    return [
        f"model.path={model}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
        "model.dtype=float32", "data.pack_length=512", f"run.dir={folder}", "objective.name=psft", "objective.clip_high=0.02",
        "train.batch_size=32", "train.minibatch_size=16", f"train.steps={STEPS}", "optimizer.lr=1e-3", "checkpoint.interval=1",
        "checkpoint.async_save=false", "log.tensorboard=false", "log.progress=false", "log.tokens=2", "log.tokens_rows=3", *more,
    ]  # fmt: skip


def run(model, data, folder, *more, saves: bool = False, kill_after: int | None = None) -> None:
    """As one rank.

    Args:
        saves: whether checkpoints are, which takes seconds; counts are written as if they were.
        kill_after: so many steps, and one that is lost, it ends without a word.
    """
    plan = plan_run(load_config(None, options(model, data, folder, *more)), int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, plan.config.parallel, seed=1)
    one = start(plan)
    saved, steps = one.save_if_due, one.steps
    if one.tokens and not saves:
        one.save_if_due = lambda step, phase: one.tokens.write_counts()
    if not one.tokens:
        one.save_if_due = lambda step, phase: None
    if kill_after is not None:
        one.save_if_due = lambda step, phase: saved(step, phase) if step < kill_after else one.tokens.write_counts()
        one.steps = lambda: (step for step in steps() if step <= kill_after)
    train(one)
    shutdown()


@pytest.fixture(scope="module")
def alone(tiny_models, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, run, tiny_models("qwen3"), tiny_data, folder)
    return folder


def recorded(folder) -> dict[str, list[dict]]:
    return {path.name: read_records(path) for path in sorted((folder / "tokens").glob("step-*"))}


def counted(folder) -> dict[int, dict[int, np.ndarray]]:
    """Epoch -> token id -> (trained, clipped)."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for line in read_records(folder / "tokens/counts.jsonl"):
        epoch = found.setdefault(line["epoch"], {})
        for one, *numbers in zip(line["ids"], line["trained"], line["clipped"], strict=True):
            epoch[one] = epoch.get(one, np.zeros(2, int)) + numbers
    return found


def test_what_is_recorded(alone):
    files = recorded(alone)
    assert list(files) == ["step-000002-update-000003.jsonl", "step-000002-update-000004.jsonl"]
    first, second = files.values()
    for line in first + second:
        lengths = {len(value) for value in line.values() if isinstance(value, list)}
        assert len(lengths) == 1
        assert line["positions"] == list(range(len(line["token_ids"])))
        assert (line["step"], line["epoch"]) == (2, 1)
        assert len(set(line["loss_weights"])) == 1  # a token mean
        assert all(x < 0 for x in line["logprobs"])
        assert all(0 < x < np.log(307) + 1e-3 for x in line["entropy"])
    assert [line["sample"] for line in first] == [0, 1, 2]
    assert {ratio for line in first for ratio in line["ratios"]} == {1.0}  # the first update of a step: of the old policy itself
    ratios = np.array([ratio for line in second for ratio in line["ratios"]])
    clipped = np.array([clipped for line in second for clipped in line["clipped"]])
    assert np.array_equal(clipped, ratios > 1.02)
    assert 0 < clipped.mean() < 1
    assert "".join(first[0]["tokens"]).rstrip().endswith("<|im_end|>")


def test_counts_are_of_all_tokens(alone):
    """Their sums are what metrics.jsonl says of each epoch, clipped tokens too."""
    records, found = read_records(alone / "metrics.jsonl"), counted(alone)
    assert list(found) == [1, 2]
    for epoch, steps in ((1, (1, 2)), (2, (3,))):
        updates = [record for record in records if record["step"] in steps]
        trained, clipped = np.sum(list(found[epoch].values()), axis=0)
        assert trained == sum(record["data/trained_tokens"] for record in updates)
        expected = sum(record["data/trained_tokens"] * record["objective/clip_fraction"] for record in updates)
        assert clipped == round(expected) > 0
    lines = read_records(alone / "tokens/counts.jsonl")
    assert [(line["step"], line["update"]) for line in lines] == [(1, 2), (2, 4), (3, 6)]  # with each checkpoint
    assert all(len(line["tokens"]) == len(line["ids"]) for line in lines)


@pytest.mark.parametrize(
    "split",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.context_parallel_size=2"],
        ["data.packing=false", "data.micro_batch_size=3"],
    ],
    ids=["tp2", "pp2", "cp2", "unpacked dp2"],
)
def test_every_split_records_the_same(split, alone, tiny_models, tiny_data, tmp_path):
    run_ranks(2, run, tiny_models("qwen3"), tiny_data, tmp_path, *split)
    ours, theirs = recorded(tmp_path), recorded(alone)
    assert ours.keys() == theirs.keys()
    for name, lines in ours.items():
        for one, other in zip(lines, theirs[name], strict=True):
            for key in ("step", "update", "epoch", "sample", "token_ids", "tokens", "positions", "loss_weights"):
                assert one[key] == other[key], key
            for key in ("logprobs", "ratios", "entropy"):
                np.testing.assert_allclose(one[key], other[key], rtol=2e-3, atol=2e-4, err_msg=key)
            near = np.abs(np.array(other["ratios"]) - 1.02) < 1e-3  # rounding may decide
            assert np.array_equal(np.array(one["clipped"])[~near], np.array(other["clipped"])[~near])
    for epoch, words in counted(alone).items():
        found = counted(tmp_path)[epoch]
        assert {one: trained for one, (trained, _) in found.items()} == {one: trained for one, (trained, _) in words.items()}
        (_, clipped), (trained, of_alone) = (np.sum(list(each.values()), axis=0) for each in (found, words))
        assert abs(clipped - of_alone) <= 0.01 * trained


def test_a_run_that_was_killed_ends_with_the_same_counts(alone, tiny_models, tiny_data, tmp_path):
    run_ranks(1, _killed, tiny_models("qwen3"), tiny_data, tmp_path)
    assert latest(tmp_path / "checkpoints").name == "step-00000001"
    assert [line["step"] for line in read_records(tmp_path / "tokens/counts.jsonl")] == [1, 2]
    assert len(recorded(tmp_path)) == 2
    (tmp_path / "tokens/step-000002-update-000009.jsonl").write_text("")  # of another that came further
    run_ranks(1, _continued, tiny_models("qwen3"), tiny_data, tmp_path)
    assert recorded(tmp_path) == recorded(alone)
    assert read_records(tmp_path / "tokens/counts.jsonl") == read_records(alone / "tokens/counts.jsonl")


def _killed(model, data, folder):
    run(model, data, folder, saves=True, kill_after=1)


def _continued(model, data, folder):
    run(model, data, folder)


def test_it_changes_no_number(alone, tiny_models, tiny_data, tmp_path):
    run_ranks(1, run, tiny_models("qwen3"), tiny_data, tmp_path, "log.tokens=0", "log.tokens_rows=4")
    assert not (tmp_path / "tokens").exists()
    ours, theirs = (read_records(folder / "metrics.jsonl") for folder in (tmp_path, alone))
    assert [without_times(record) for record in ours] == [without_times(record) for record in theirs]


def without_times(record):
    timed = ("perf/seconds", "perf/tokens_per_second", "perf/tflops_per_device")
    return {key: value for key, value in record.items() if key not in timed}


def test_a_skipped_update_is_not_kept(tiny_models, tiny_data, tmp_path):
    assert run_ranks(1, _skipped, tiny_models("qwen3"), tiny_data, tmp_path) == [[[], ["step-000001-update-000002.jsonl"], [4]]]


def _skipped(model, data, folder):
    plan = plan_run(load_config(None, options(model, data, folder, "log.tokens=1")), 1)
    initialize(plan.mesh, plan.config.parallel, seed=1)
    tokens = Tokens(folder / "tokens", plan.config.log, plan.template, plan.hf.vocab_size)
    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = microbatch(mask, mask / 4, old_logprobs=torch.full((1, 4), -1.0))
    output = PolicyOutput(logprobs=torch.full((1, 4), -1.0), entropy=torch.ones(1, 4))
    metrics = PSFT()(output, batch)[1]
    tokens.begin(0, 0.0)
    found = []
    for update, skipped in ((1, True), (2, False)):
        tokens.add(output, batch, metrics)
        tokens.end_update(update, skipped)
        found.append(sorted(path.name for path in (folder / "tokens").glob("step-*")))
    tokens.write_counts()
    tokens.close()
    shutdown()
    return [*found, [sum(line["trained"]) for line in read_records(folder / "tokens/counts.jsonl")]]


def test_a_record_of_a_sample():
    """A prompt of two tokens; the token at 4 is not trained; a probability of 0 is no number of JSON."""
    rows = np.zeros((6, len(COLUMNS)))
    rows[1] = [1, 7, -0.25, 1.5, 1, 0.5, 0.125]
    rows[2] = [1, 9, -np.inf, 1.0, 0, 0.1, 0.125]
    rows[4] = [1, 7, -1.0, 0.5, 0, 0.2, 0.125]
    record = json.loads(json.dumps(token_record(rows), allow_nan=False))
    assert record == {
        "token_ids": [7, 9, 7], "positions": [0, 1, 3], "logprobs": [-0.25, None, -1.0], "ratios": [1.5, 1.0, 0.5],
        "clipped": [True, False, False], "entropy": [0.5, 0.1, 0.2], "loss_weights": [0.125] * 3,
    }  # fmt: skip


def test_nothing_to_forget(tmp_path):
    forget_tokens(tmp_path / "tokens", 0)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_recording_are_refused(tiny_models, tiny_data, tmp_path):
    with pytest.raises(Refused, match="log.tokens_rows=3: says something of recorded tokens, and log.tokens=0 records none"):
        plan_run(load_config(None, options(tiny_models("qwen3"), tiny_data, tmp_path, "log.tokens=0")), 1)
