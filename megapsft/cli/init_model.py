"""megapsft init-model: a small random model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from megapsft.checkpoint.random_model import RandomModel

USUAL = RandomModel()


def init_model(*, family: str, data: Path, out: Path, model: tyro.conf.OmitArgPrefixes[RandomModel] = USUAL) -> int:
    """Make a small random Hugging Face checkpoint, with a tokenizer trained on your data.

    For example:
        megapsft init-model --family qwen3_moe --data train.jsonl --out models/tiny
        megapsft init-model --family llama --data train.parquet --vocab-size 2048 --hidden-size 256 --out models/larger

    Args:
        family: qwen3, qwen3_moe, qwen2, llama or qwen2_5_vl, which has a tiny vision tower too.
        data: .jsonl or .parquet; the tokenizer is trained on all its texts, whatever the columns.
        out: the folder to make; it must not hold anything yet.
    """
    from megapsft.checkpoint.random_init import init_model as make

    print(f"made {make(family, data, out, **dataclasses.asdict(model))}")
    return 0
