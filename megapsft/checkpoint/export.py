"""A run's checkpoint as a Hugging Face folder, or its adapters as one of PEFT."""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.adapters import export_adapter, merges_adapters
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf, model_of_run
from megapsft.checkpoint.convert.run import Result
from megapsft.checkpoint.hf_folder import read_config
from megapsft.checkpoint.state import read_state
from megapsft.errors import Refused


def export_run(run: Path, out: Path, checkpoint: str = "latest", dtype: str | None = None, base: Path | None = None) -> Result:
    """Convert `checkpoint` of `run`, whatever split wrote it, to `out`; adapters are merged.

    Args:
        dtype: bf16, fp16 or fp32; None: that of the run.
        base: of a run with LoRA, the model that it started from; None: where the run found it.

    Raises:
        Refused: no such run or checkpoint; a base of a run that has none; what `megatron_to_hf` refuses.
    """
    path = _checkpoint(run, checkpoint)
    if base is not None and not merges_adapters(read_state(path.resolve())):
        raise Refused(f"--base {base}", f"is for runs with LoRA, and {run} trained all weights", "leave it out")
    return megatron_to_hf(path, out, dtype=dtype, base=base)


def export_adapter_of(run: Path, out: Path, checkpoint: str = "latest", base: Path | None = None) -> Result:
    """The adapters in `checkpoint` of `run`, whatever split wrote it, to `out`, as PEFT's save_pretrained has them.

    Raises:
        Refused: no such run or checkpoint; a run without LoRA; what `export_adapter` refuses.
    """
    path, kept = _checkpoint(run, checkpoint).resolve(), model_of_run(run)
    state = read_state(path)
    if not merges_adapters(state):
        raise Refused(str(run), "has no adapters: it trained all weights", "leave --adapter out")
    return export_adapter(path, state, kept, read_config(kept), out, base)


def _checkpoint(run: Path, checkpoint: str) -> Path:
    if not (run / "config.yaml").is_file():
        raise Refused(str(run), "is not the folder of a run (no config.yaml)", "name a run.dir")
    if not checkpoint or checkpoint != Path(checkpoint).name:
        remedy = "use latest, best or one such as step-00000050"
        raise Refused(f"--checkpoint {checkpoint!r}", "is no name in RUN/checkpoints", remedy)
    path = run / "checkpoints" / checkpoint
    if not path.exists():
        there = sorted(p.name for p in path.parent.glob("*") if not p.name.endswith(".partial")) if path.parent.exists() else []
        raise Refused(str(path), "is not there", "use one of " + ", ".join(there) if there else "train a step first")
    return path
