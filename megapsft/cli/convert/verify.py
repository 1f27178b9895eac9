"""megapsft convert verify."""

from __future__ import annotations

from pathlib import Path

from megapsft.cli.convert.sizes import memory_of


def verify(
    *,
    hf: Path,
    against: Path,
    model: Path | None = None,
    logits: bool = False,
    max_memory: str | None = None,
    workers: int = 4,
) -> int:
    """Compare a Hugging Face folder with another, or with a checkpoint: config, names, shapes, every bit, and the manifests.

    For example:
        megapsft convert verify --hf exports/x --against runs/x/checkpoints/latest
        megapsft convert verify --hf exports/x --against Qwen3-30B-A3B --logits

    Exit code 0 where all is the same, 1 where something differs.

    Args:
        hf: folder with config.json and safetensors.
        against: another one, a run, one of its checkpoints, what hf-to-megatron made, or Megatron-LM's --save.
        model: folder with the config of `against`, where it is a checkpoint that does not say it itself.
        logits: also run both on a sample of tokens, the folder in transformers; both models must fit into memory.
        max_memory: that the process may have, with all it needs, but for --logits; default: 600MiB.
        workers: threads that read.
    """
    from rich.filesize import decimal

    from megapsft.checkpoint.convert.verify import verify as compare
    from megapsft.checkpoint.convert.workers import Options

    report = compare(hf, against, model, Options(max_memory=memory_of(max_memory), workers=workers))
    if logits:
        from megapsft.checkpoint.convert.logits import compare_logits

        compare_logits(hf, against, model, report)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"DIFFERENT: {problem}")
    print(f"{report.equal} of {report.tensors} tensors are equal bit by bit, {decimal(report.nbytes)} read")
    return 1 if report.problems else 0
