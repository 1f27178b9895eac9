"""Scenarios from a test's side: models to measure, and the process that measures them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megapsft.checkpoint.random_init import init_model

ROOT = Path(__file__).parents[2]
WIDTHS = {  # of the real models; their layers are few
    "qwen3-8b": ("qwen3", dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
                               head_dim=128, vocab_size=151_936)),
    "qwen3-30b-a3b": ("qwen3_moe", dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4,
                                        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                                        vocab_size=151_936)),
}  # fmt: skip


def measured(jobs: Mapping[str, tuple[str, dict[str, Any]]], folder: Path, *flags: str, seconds: float = 600) -> dict[str, Any]:
    """What one process of tests/gpu/scenarios.py finds: (scenario, its arguments) by a name of ours."""
    out = folder / "found.json"
    command = [sys.executable, "-m", "tests.gpu.scenarios", str(out), *flags, json.dumps([*jobs.values()])]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    out.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    found = json.loads(out.read_text()) if out.exists() else []
    ended = {"error": f"the process ended with {done.returncode} before it was measured\n{done.stderr[-3000:]}"}
    return {name: Found(one) for name, one in zip_longest(jobs, found, fillvalue=ended)}


class Found(dict):
    """What was measured; of a scenario that failed there is only its error, and a test that asks for anything fails with it."""

    def __missing__(self, key: str) -> Any:
        pytest.fail(self["error"] if "error" in self else f"{key} was not measured, but {', '.join(self)}", pytrace=False)


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with what a command said, if it did."""
    if done.returncode:
        pytest.fail(f"ended with {done.returncode}\n{done.stderr[-3000:]}", pytrace=False)


def random_slice(family: str, sizes: Mapping[str, int], layers: int, data: Path, out: Path) -> Path:
    """A model of few layers and random weights in bfloat16; its vocabulary may exceed that of its tokenizer, made of `data`."""
    init_model(family=family, data_path=data, out_dir=out, num_layers=1)
    config = transformers.AutoConfig.from_pretrained(out)
    config.update(dict(sizes, num_hidden_layers=layers, layer_types=["full_attention"] * layers))
    for file in out.glob("*.safetensors"):
        file.unlink()
    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return out
