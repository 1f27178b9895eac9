"""A run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.run import Result
from megapsft.errors import Refused


def export_run(run: Path, out: Path, checkpoint: str = "latest", dtype: str | None = None) -> Result:
    """Convert `checkpoint` of `run`, whatever split wrote it, to `out`.

    Args:
        dtype: bf16, fp16 or fp32; None: that of the run.

    Raises:
        Refused: no such run or checkpoint; what `megatron_to_hf` refuses.
    """
    if not (run / "config.yaml").is_file():
        raise Refused(str(run), "is not the folder of a run (no config.yaml)", "name a run.dir")
    path = run / "checkpoints" / checkpoint
    if not path.exists():
        there = sorted(p.name for p in path.parent.glob("*") if not p.name.endswith(".partial")) if path.parent.exists() else []
        raise Refused(str(path), "is not there", "use one of " + ", ".join(there) if there else "train a step first")
    return megatron_to_hf(path, out, dtype=dtype)
