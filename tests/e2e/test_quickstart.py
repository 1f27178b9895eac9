"""The quickstart with few steps: the commands it prints, and what they leave. Not here: how well the model gets."""

import json
import math
import subprocess
import sys
from pathlib import Path

import transformers

from megapsft.config import load_config
from quickstart.__main__ import MADE, clear

ROOT = Path(__file__).resolve().parent.parent.parent


def test_few_steps(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quickstart", "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    printed = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("$ ")]
    names = ["make-data", "make-data", "init-model", "train", "export"]
    assert printed == [*(["megapsft", name] for name in names), ["python", "-m"], ["megapsft", "curves"]]
    assert "$ megapsft train configs/quickstart.yaml" in done.stdout
    for text in ("warm-up", "PSFT", "answer of the model", "true answer", str(out / "export"), "quickstart: done"):
        assert text in done.stdout

    assert sorted(path.name for path in out.iterdir()) == sorted(MADE)
    assert list((out / "run/tensorboard").glob("events*"))
    for picture in ("curves.png", "curves-step.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert transformers.AutoConfig.from_pretrained(out / "export").architectures == ["Qwen3MoeForCausalLM"]
    records = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["objective"] for record in records] == ["sft"] * 16 + ["psft"] * 16
    assert all(math.isfinite(record["train/loss"]) for record in records)
    assert records[15]["objective/nll"] < records[0]["objective/nll"]
    assert max(record["objective/clip_fraction"] for record in records[16:]) > 0


def test_it_lies_where_the_config_says():
    config = load_config(ROOT / "configs/quickstart.yaml")
    out = Path(config.run.dir).parent
    assert out == Path("runs/quickstart")
    assert (config.run.dir, config.model.path, config.data.path) == tuple(str(out / n) for n in ("run", "model", "train.jsonl"))


def test_clearing_takes_only_what_it_made(tmp_path):
    for name in (*MADE, "mine.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "run").unlink()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
