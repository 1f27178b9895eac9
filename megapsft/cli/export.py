"""megapsft export: the weights of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from megapsft.cli.printed import show_converted
from megapsft.errors import Refused


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    checkpoint: str = "latest",
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    adapter: bool = False,
    base: Path | None = None,
) -> int:
    """Write a run's weights as a Hugging Face folder, with config, tokenizer and chat template; bounded memory, no GPU.

    For example:
        megapsft export runs/tiny --out exports/tiny
        megapsft export runs/tiny --out exports/best --checkpoint best --dtype bf16
        megapsft export runs/tiny-lora --out exports/adapter --adapter

    Args:
        run: the run's folder.
        out: the folder to make; it must not hold anything yet.
        checkpoint: latest, best, or a folder name under RUN/checkpoints such as step-00000050.
        dtype: of the exported weights; default: that of the run.
        adapter: of a run with LoRA, only its adapters, as PEFT has them; default: merged into the weights beside them.
        base: of a run with LoRA, the model that it started from, and that PEFT loads; default: where the run found it.
    """
    from megapsft.checkpoint.export import export_adapter_of, export_run

    if not adapter:
        return show_converted(False, export_run(run, out, checkpoint, dtype, base))
    if dtype is not None:
        rule = "is of merged weights, and --adapter writes adapters as they are"
        raise Refused(f"--dtype {dtype}", rule, "leave it out")
    return show_converted(False, export_adapter_of(run, out, checkpoint, base))
