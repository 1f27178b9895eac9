"""megapsft convert hf-to-megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megapsft.cli.convert.sizes import memory_of
from megapsft.cli.printed import show_converted


def hf_to_megatron(
    *,
    hf: Path,
    out: Path,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    adapter: Path | None = None,
    keep_adapter: bool = False,
    max_memory: str | None = None,
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
) -> int:
    """Convert a Hugging Face folder to a torch_dist checkpoint that Megatron loads under any split. No GPU, bounded memory.

    For example:
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt --dtype bf16 --max-memory 1GiB --workers 8
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out merged --adapter lora
        megapsft train CONFIG.yaml model.path=ckpt

    Killed, it goes on from there when it is run again.

    Args:
        hf: folder with config.json and safetensors; FP8 weights in blocks are read with their scales.
        out: the folder to make; it must not hold anything yet.
        dtype: of the checkpoint; default: as stored, FP8 as bf16.
        adapter: folder of a LoRA adapter that PEFT saved, which is merged into the weights.
        keep_adapter: do not merge it, but keep it beside the base; megatron-to-hf gives it back.
        max_memory: that the process may have, with all it needs; default: 600MiB.
        workers: threads that read and write.
        verify: read the result back, and compare it with the source bit by bit.
        dry_run: check everything, say what would be written, write nothing.
    """
    from megapsft.checkpoint.convert import hf_to_megatron as to_megatron
    from megapsft.checkpoint.convert.workers import Options

    options = Options(max_memory=memory_of(max_memory), workers=workers, read_back=verify, dry_run=dry_run)
    return show_converted(dry_run, to_megatron.hf_to_megatron(hf, out, dtype, adapter, keep_adapter, options))
