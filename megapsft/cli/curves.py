"""megapsft curves: a picture of runs."""

from __future__ import annotations

from pathlib import Path

import tyro


def curves(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path) -> int:
    """Draw the curves of one run or several into a PNG, and print a table of their phases.

    For example:
        megapsft curves runs/sft runs/psft --out curves.png

    Args:
        runs: the runs' folders.
        out: the PNG to write.
    """
    from rich.console import Console

    from megapsft.report.curves import draw_curves
    from megapsft.report.table import phase_table

    for run in runs:
        Console().print(phase_table(run / "metrics.jsonl"))
    draw_curves({run.name: run / "metrics.jsonl" for run in runs}, out)
    print(f"drew {out}")
    return 0
