"""megapsft export: the weights of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from megapsft.cli.printed import show_converted


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    checkpoint: str = "latest",
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
) -> int:
    """Write a run's weights as a Hugging Face folder, with config, tokenizer and chat template; bounded memory, no GPU.

    For example:
        megapsft export runs/tiny --out exports/tiny
        megapsft export runs/tiny --out exports/best --checkpoint best --dtype bf16

    Args:
        run: the run's folder.
        out: the folder to make; it must not hold anything yet.
        checkpoint: latest, best, or a folder name under RUN/checkpoints such as step-00000050.
        dtype: of the exported weights; default: that of the run.
    """
    from megapsft.checkpoint.export import export_run

    return show_converted(False, export_run(run, out, checkpoint, dtype))
