"""Models side by side on real ranks, against what transformers says of them.

Not here: CUDA, mixtures of experts (as of every pass), what is drawn of it (tests/report).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft import cli
from megapsft.checkpoint.export import export_run
from megapsft.config import load_config
from megapsft.data.demonstrations import load_demonstrations
from megapsft.errors import Refused
from megapsft.parallel import initialize, shutdown
from megapsft.report.compare import read_json
from megapsft.train.compare import compare_models, config_of, plan_comparison
from megapsft.train.comparison import Comparison, from_json, to_json
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start
from tests.ranks import run_ranks

COLUMNS = ("data.columns.prompt=question", "data.columns.demonstration=answer", "data.pack_length=512", "model.dtype=float32")
ROWS = 40  # two minibatches


@pytest.fixture(scope="module")
def tuned(tiny_models, tmp_path_factory) -> Path:
    """Other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "other"
    shutil.copytree(tiny_models("qwen3"), folder)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    moved = {name: one + 0.1 * torch.randn(one.shape, generator=generator).to(one.dtype) for name, one in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(base, data, tuned, references=(), *more) -> Comparison:
    config = config_of(base, data, ROWS, [*COLUMNS, *more])
    plan = plan_comparison(config, int(os.environ["WORLD_SIZE"]), [(None, path) for path in tuned], references)
    initialize(plan.run.mesh, plan.run.config.parallel, seed=1)
    said = []
    comparison = compare_models(plan, said.append)
    shutdown()
    assert len(said) == plan.minibatches
    return comparison


@pytest.fixture(scope="module")
def alone(tiny_models, tiny_data, tuned) -> Comparison:
    base = tiny_models("qwen3")
    return run_ranks(1, measure, base, tiny_data, [tuned], [("twin", base)])[0]


def test_what_transformers_says(alone, tiny_models, tiny_data, tuned):
    ours = run_ranks(1, _of_transformers, tiny_models("qwen3"), tuned, tiny_data)[0]
    tolerance = {"rtol": 1e-3, "atol": 2e-4}
    assert np.array_equal(alone.token_ids, ours["token_ids"])
    for seen, name in ((alone.base, "base"), (alone.tuned[0], "tuned")):
        np.testing.assert_allclose(seen.logprobs, ours[name]["logprobs"], **tolerance)
        np.testing.assert_allclose(seen.entropy, ours[name]["entropy"], **tolerance)
        assert (seen.ranks == ours[name]["ranks"]).mean() > 0.99  # words may be as good as one another
    np.testing.assert_allclose(alone.tuned[0].kl, ours["kl"], **tolerance)
    np.testing.assert_allclose(alone.tuned[0].kl_of_base, ours["kl_of_base"], **tolerance)
    assert alone.tuned[0].kl.mean() > 0.1
    assert not np.allclose(alone.tuned[0].kl, alone.tuned[0].kl_of_base, **tolerance)


@torch.no_grad()
def _of_transformers(base, tuned, data):
    from transformers import AutoModelForCausalLM

    from megapsft.data.chat_template import ChatTemplate

    config = load_config(None, [f"data.path={data}", f"data.limit={ROWS}", *COLUMNS])
    rows = load_demonstrations(config.data, ChatTemplate.load(base), 307)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (base, tuned)]
    found = {"base": {}, "tuned": {}}
    columns: dict = {}
    for sample in rows.samples:
        ids, there = torch.from_numpy(sample.token_ids.astype(np.int64)), torch.from_numpy(sample.loss_mask[1:])
        logs = [model(ids[None]).logits[0, :-1].double().log_softmax(-1)[there] for model in models]
        labels = ids[1:][there][:, None]
        for name, log in zip(found, logs, strict=True):
            own = log.gather(1, labels)
            entropy, ranks = -(log.exp() * log).sum(1), 1 + (log > own).sum(1)
            for key, values in (("logprobs", own[:, 0]), ("entropy", entropy), ("ranks", ranks)):
                columns.setdefault((name, key), []).append(values.numpy())
        columns.setdefault("token_ids", []).append(labels[:, 0].numpy())
        columns.setdefault("kl", []).append((logs[1].exp() * (logs[1] - logs[0])).sum(1).numpy())
        columns.setdefault("kl_of_base", []).append((logs[0].exp() * (logs[0] - logs[1])).sum(1).numpy())
    for key, values in columns.items():
        where, name = (found[key[0]], key[1]) if isinstance(key, tuple) else (found, key)
        where[name] = np.concatenate(values)
    return found


def test_a_twin_is_the_base(alone):
    (twin,) = alone.references
    assert twin.name == "twin"
    assert np.array_equal(twin.logprobs, alone.base.logprobs)
    assert np.array_equal(twin.ranks, alone.base.ranks)
    assert np.abs(twin.kl).max() < 1e-5
    assert alone.distance(twin, alone.base) == 0
    assert 0 < alone.distance(alone.tuned[0], alone.base) == alone.distance(alone.base, alone.tuned[0]) < 1


@pytest.mark.parametrize(
    "split",
    [
        ["parallel.pipeline_model_parallel_size=2", "data.packing=false"],
        ["parallel.context_parallel_size=2"],
    ],
    ids=["pp2 unpacked", "cp2"],
)
def test_every_split_says_the_same(split, alone, tiny_models, tiny_data, tuned):
    for found in run_ranks(2, measure, tiny_models("qwen3"), tiny_data, [tuned], [], *split):
        check_same(found, alone)


def check_same(found: Comparison, alone: Comparison) -> None:
    assert np.array_equal(found.token_ids, alone.token_ids)
    assert (found.lengths, found.sources, found.words) == (alone.lengths, alone.sources, alone.words)
    for ours, theirs in ((found.base, alone.base), (found.tuned[0], alone.tuned[0])):
        assert (ours.ranks == theirs.ranks).mean() > 0.99
        for column in ("logprobs", "entropy", "kl", "kl_of_base"):
            if getattr(theirs, column) is not None:
                np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), rtol=1e-3, atol=1e-4)


def test_the_command_under_tensor_parallelism(alone, tiny_models, tiny_data, tuned, tmp_path):
    split = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "model.logprob_chunk_bytes=4096"]
    arguments = ["compare", "--base", tiny_models("qwen3"), "--tuned", f"run={tuned}", "--data", tiny_data, "--rows", ROWS,
                 "--json", tmp_path / "compare.json", "--out", tmp_path / "compare.html", *COLUMNS, *split]  # fmt: skip
    first, second = run_ranks(2, _said, [str(argument) for argument in arguments])
    assert f"{len(alone.token_ids):,} tokens of {ROWS} responses of" in first
    assert "run: words that gained and lost most" in first
    assert second == ""  # the first rank alone reports
    found = read_json(tmp_path / "compare.json")
    check_same(found, alone)
    assert found.tuned[0].name == "run"
    assert "<svg" in (tmp_path / "compare.html").read_text()


def _said(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(arguments) == 0
    return out.getvalue()


def test_a_checkpoint_of_a_run_is_the_model_that_it_exports(tiny_models, tiny_data, tmp_path):
    (found,) = run_ranks(1, _checkpoint_and_export, tiny_models("qwen3"), tiny_data, tmp_path)
    checkpoint, exported = found.tuned
    assert (checkpoint.name, exported.name) == ("run", "exported")
    np.testing.assert_allclose(checkpoint.logprobs, exported.logprobs, rtol=1e-5, atol=1e-6)
    assert np.abs(found.shift(checkpoint)).max() > 1e-4


def _checkpoint_and_export(model, data, folder):
    options = [f"model.path={model}", f"data.path={data}", f"run.dir={folder}/run", "objective.name=sft", "train.batch_size=8",
               "train.steps=1", "optimizer.lr=1e-3", "checkpoint.async_save=false", "log.tensorboard=false", "log.progress=false",
               *COLUMNS]  # fmt: skip
    plan = plan_run(load_config(None, options), 1)
    initialize(plan.mesh, plan.config.parallel, seed=1)
    train(start(plan))
    shutdown()
    export_run(folder / "run", folder / "exported")
    return measure(model, data, [folder / "run/checkpoints/latest", folder / "exported"])


def test_json_keeps_it_all(alone):
    again = from_json(json.loads(json.dumps(to_json(alone), allow_nan=False)), "compare.json")
    assert to_json(again) == to_json(alone)
    np.testing.assert_allclose(again.tuned[0].kl, alone.tuned[0].kl, rtol=1e-6)
    assert again.references[0].name == "twin"
    with pytest.raises(Refused, match="x.json: is not what `megapsft compare --json` writes"):
        from_json({"rows": []}, "x.json")


def test_another_tokenizer_is_refused(tiny_models, tiny_data, tmp_path):
    base, other = tiny_models("qwen3"), tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Refused, match="other: has another tokenizer than .*; compare models with the same tokenizer"):
        plan_comparison(config_of(base, tiny_data, 4, COLUMNS), 1, [(None, other)], [])


def test_another_vocabulary_is_refused(tiny_models, tiny_data, tmp_path):
    from megapsft.checkpoint.random_init import init_model

    other = tmp_path / "wide"
    init_model(family="qwen3", data_path=tiny_data, out_dir=other, vocab_size=320, hidden_size=64, head_dim=24)
    with pytest.raises(Refused, match=r"wide: has a vocabulary of \d+, and .* one of \d+; compare models with the same"):
        plan_comparison(config_of(tiny_models("qwen3"), tiny_data, 4, COLUMNS), 1, [("wide", other)], [])


@pytest.mark.parametrize(
    ("overrides", "rows", "message"),
    [
        (["optimizer.lr=1"], 4, r"optimizer.lr=1: is not read by a comparison; it reads data.\*, model.\*, parallel.\*, fp8.\*"),
        (["model.path=x"], 4, "model.path=x: is what --base says; leave it out"),
        (["data.limit=3"], 4, "data.limit=3: is what --rows says; leave it out"),
        (["data.kind=prompts"], 4, "data.kind=prompts: has no responses to look at; record some: megapsft rollout"),
        ([], 0, "--rows 0: must be 1 or more"),
    ],
)
def test_what_is_not_read_is_refused(overrides, rows, message):
    with pytest.raises(Refused, match=message):
        config_of(Path("models/tiny"), Path("train.jsonl"), rows, overrides)
