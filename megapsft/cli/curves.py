"""megapsft curves: a picture of runs."""

from __future__ import annotations

from pathlib import Path

import tyro


def curves(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path) -> int:
    """Draw the curves of one run or several into a PNG, and print tables of their phases and of where a step goes.

    A second picture beside it, NAME-step.png, shows the parts of each step.

    For example:
        megapsft curves runs/sft runs/psft --out curves.png

    Args:
        runs: the runs' folders.
        out: the PNG to write.
    """
    from rich.console import Console

    from megapsft.output.places import check_file
    from megapsft.report.curves import draw_curves
    from megapsft.report.step import draw_steps, spent_by, step_table
    from megapsft.report.table import phase_table

    check_file("--out", out)
    console, timed = Console(), {}
    for run in runs:
        console.print(phase_table(run / "metrics.jsonl"))
        found = spent_by(run)
        if found is not None:
            console.print(step_table(found, run.name))
            timed[run.name] = run
    draw_curves({run.name: run / "metrics.jsonl" for run in runs}, out)
    print(f"drew {out}")
    if timed:
        beside = out.with_name(f"{out.stem}-step.png")
        draw_steps(timed, beside)
        print(f"drew {beside}")
    return 0
