"""`megapsft probe` as a user starts it."""

from __future__ import annotations

import json

import pytest

from tests.command import megapsft

CONFIG = "configs/psft/tiny-qwen3-gsm8k.yaml"
SMALL = ("train.batch_size=16", "train.minibatch_size=8", "data.pack_length=512", "model.dtype=bfloat16")


@pytest.mark.parametrize(("family", "more"), [("qwen3", ()), ("qwen3_moe", ("parallel.tensor_model_parallel_size=2",))])
def test_probe(family, more, tiny_models, tiny_data, tmp_path):
    here = (f"model.path={tiny_models(family)}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}")
    out, plot = tmp_path / "made/probe.json", tmp_path / "made/probe.png"
    done = megapsft("probe", CONFIG, "--out", str(out), "--plot", str(plot), "--samples", "12", *here, *SMALL, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["verdict"] in done.stdout.replace("\n", " ")
    assert f"ratios are exactly 1 on {found['count']:,} tokens" in found["verdict"]
    assert done.stdout.count("old pass alone") == 1  # the first rank alone reports
    assert (found["cause"], found["clip_low"], found["clip_high"]) == (None, None, 0.28)
    assert {(row["kind"], row["title"]) for row in found["rows"]} >= {
        ("configured", "as configured"), ("not shared", "unpacked"), ("not shared", "in float32")
    }  # fmt: skip
    last = found["rows"][-1]
    assert last["routing_replay"] is (True if family == "qwen3_moe" else None)
    assert last["quantiles"]["0.5"] < last["quantiles"]["0.99"] < last["max"]
    (precision,) = found["precisions"]
    assert (precision["name"], precision["finer"]) == ("bfloat16", "float32")
    assert 0 < precision["kl"]["quantiles"]["0.5"] < precision["kl"]["max"] < precision["logits_rms"]["max"] < 1
    assert "bfloat16 beside float32" in done.stdout
    assert found["max_noise_clipped"] is None
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert plot.stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]  # no run.dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "megapsft: --samples 0: must be 1 to 64, the rows of"),
        (["--nproc-per-node", "0"], "megapsft: --nproc-per-node 0: must be 1 or more; leave it out for as many as the split"),
        (["model.moe_routing_replay=true"], "megapsft: model.moe_routing_replay=True: is of experts, and Qwen3ForCausalLM has"),
    ],
)
def test_what_cannot_be(arguments, message, tiny_models, tiny_data):
    here = (f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}")
    done = megapsft("probe", CONFIG, *here, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
