"""PSFT of a model that sees images, on text: the shipped config on a tiny model, its export, what transformers makes of that."""

import json

import pytest
import torch
import transformers

from megapsft import cli
from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.errors import Refused
from megapsft.train.plan import plan_run
from tests.ranks import run_ranks
from tests.shipped import FOLDER
from tests.vision import of_vision, stored

HERE = [
    "data.columns.prompt=question", "data.columns.demonstration=answer",
    "model.dtype=float32", "data.max_length=256", "data.pack_length=256", "train.batch_size=8", "train.minibatch_size=4",
    "train.steps=3", "optimizer.lr=1e-2", "optimizer.lr_warmup_steps=0", "log.tensorboard=false", "log.progress=false",
]  # fmt: skip


def test_trains_on_text_and_gives_the_vision_tower_back(tmp_path):
    data, model, run, out = (tmp_path / name for name in ("rows.jsonl", "model", "run", "out"))
    write_jsonl(data, generate(100, 0))
    init_model("qwen2_5_vl", data, model, vocab_size=300, hidden_size=32, head_dim=8, num_layers=2, intermediate_size=64)
    (model / "preprocessor_config.json").write_text("{}")
    places = [f"model.path={model}", f"data.path={data}", f"run.dir={run}"]
    config = FOLDER / "psft/qwen2.5-vl-7b.yaml"
    notes = plan_run(load_config(config, [*places, *HERE]), 2).notes
    assert any("text alone is trained; visual.* is not loaded, and exported as it came" in note for note in notes)
    write_jsonl(tmp_path / "images.jsonl", [*generate(2, 0), {"question": "<|image_pad|> Which?", "answer": "That."}])
    with pytest.raises(Refused, match=r"images.jsonl:3: holds <\|image_pad\|>, which stands for an image or a video"):
        plan_run(load_config(config, [*places, *HERE, f"data.path={tmp_path / 'images.jsonl'}"]), 2)
    assert run_ranks(2, cli.main, ["train", str(config), *places, *HERE]) == [0, 0]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert records[0]["objective/ratio_max"] == 1.0
    assert records[-1]["objective/nll"] < records[0]["objective/nll"] - 0.2

    model.rename(tmp_path / "gone")  # all that an export needs is in the run
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    before, after = stored(tmp_path / "gone"), stored(out)
    assert after.keys() == before.keys()
    seen = of_vision(before)
    assert len(seen) > 20
    assert all(torch.equal(after[name], tensor) for name, tensor in seen.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items() if name not in seen)
    assert (out / "preprocessor_config.json").is_file()
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(loaded).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    # fails where the logits of transformers and of Megatron are further apart than 1e-4 of the largest
    assert run_ranks(1, cli.main, ["convert", "verify", "--hf", str(out), "--against", str(run), "--logits"]) == [0]
    sampled = ["rollout", "--model", str(out), "--data", str(data), "--limit", "2", "--n", "1", "--max-tokens", "4"]
    rollouts = tmp_path / "rollouts.jsonl"
    assert run_ranks(1, cli.main, [*sampled, "--out", str(rollouts)]) == [0]
    assert len(rollouts.read_text().splitlines()) == 2
