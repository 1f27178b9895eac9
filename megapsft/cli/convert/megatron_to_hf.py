"""megapsft convert megatron-to-hf."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megapsft.cli.convert.sizes import memory_of, size_of
from megapsft.cli.printed import show_converted


def megatron_to_hf(
    *,
    megatron: Path,
    out: Path,
    hf: Path | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    fp8_blockwise: bool = False,
    max_shard_size: str = "5GB",
    max_memory: str | None = None,
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
) -> int:
    """Convert a torch_dist checkpoint, saved under any split, to a Hugging Face folder. No GPU, bounded memory.

    For example:
        megapsft convert megatron-to-hf --megatron runs/x/checkpoints/latest --out hf
        megapsft convert megatron-to-hf --megatron runs/x --out hf --dtype bf16
        megapsft convert megatron-to-hf --megatron megatron-lm/save --hf Qwen3-30B-A3B --out hf

    Killed, it goes on from there when it is run again.

    Args:
        megatron: a run, one of its checkpoints, what hf-to-megatron made, or Megatron-LM's --save.
        out: the folder to make; it must not hold anything yet.
        hf: folder with config.json and tokenizer; default: that of the model the run trained, or the import converted.
        dtype: of the weights; default: as stored.
        fp8_blockwise: linear layers in FP8 (e4m3), with a scale for each block of 128 x 128, as SGLang and vLLM read them.
        max_shard_size: most bytes of weights in a file.
        max_memory: that the process may have, with all it needs; default: 600MiB.
        workers: threads that read and write.
        verify: read the result back, and compare it with the source bit by bit.
        dry_run: check everything, say what would be written, write nothing.
    """
    from megapsft.checkpoint.convert import megatron_to_hf as to_hf
    from megapsft.checkpoint.convert.workers import Options

    options = Options(max_memory=memory_of(max_memory), workers=workers, read_back=verify, dry_run=dry_run)
    shard = size_of(max_shard_size)
    return show_converted(dry_run, to_hf.megatron_to_hf(megatron, out, hf, dtype, fp8_blockwise, shard, options))
