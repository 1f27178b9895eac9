"""megapsft report: runs on one page."""

from __future__ import annotations

from pathlib import Path

import tyro


def report(folders: tyro.conf.Positional[tuple[Path, ...]], *, out: Path = Path("report.html")) -> int:
    """Compare runs on one page of HTML that needs no network, and print tables of their phases.

    For example:
        megapsft report runs/psft runs/sft
        megapsft report runs/psft-grpo docs/results/rl.json --out report.html

    Loss, entropy, clip fraction, ratios, norms, accuracy with error bars, rewards, speed and memory over updates, steps or
    samples; what differs between the configs; of a pipeline what each stage made of the model, of a sweep how it scales, of a
    benchmark what it measured. A run may still be in progress (docs/report.md).

    Args:
        folders: of runs, pipelines and sweeps; the JSON files of benchmarks.
        out: the page to write.
    """
    from rich.console import Console

    from megapsft.output.places import check_file
    from megapsft.report.folders import read_folders
    from megapsft.report.page import write_report
    from megapsft.report.table import phase_table

    check_file("--out", out)
    shown, console = read_folders(folders), Console()
    for run in shown.runs:
        if run.updates:
            console.print(phase_table(run.folder / "metrics.jsonl"))
        else:
            console.print(f"{run.name} has no records yet")
    write_report(shown, out)
    print(f"wrote {out}")
    return 0
