"""Pretrain a tiny model, fine-tune it in every way that the papers compare, judge their findings, and write a report.

Killed and started again, it goes on with the runs that are missing; where a setting changed, with those that depend on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evidence.claims import CLAIMS
from evidence.page import judge_all, read_json, write_json, write_page
from evidence.scheduler import SECONDS, first_look, run_all
from evidence.sizes import CI, FULL, Sizes
from evidence.verdict import Verdict
from megapsft.errors import Refused

OUT = Path("docs/results")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="models and runs go here (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help=f"evidence.json and evidence.html go here (default: {OUT}; with --ci the work folder)"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on one core (default: %(default)s)")
    parser.add_argument(
        "--ci", action="store_true", help="all claims at tiny sizes: shows that it runs, and nothing of the papers"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and how long they take, and do none")
    parser.add_argument("--page", action="store_true", help="only draw evidence.html again, from evidence.json")
    options = parser.parse_args(arguments)
    sizes, out = (CI if options.ci else FULL), options.out or (options.work if options.ci else OUT)
    try:
        if options.workers < 1:
            raise Refused(f"--workers {options.workers}", "must be 1 or more", "use as many as there are cores")
        if options.dry_run:
            show_plan(sizes, options.work, options.workers)
            return 0
        if not options.page:
            write_json(run_all(sizes, options.work, options.workers).results(), sizes, out / "evidence.json")
        results, sizes, made = read_json(out / "evidence.json")
        write_page(results, sizes, made, out / "evidence.html")
        show_verdicts(judge_all(results, sizes))
    except (Refused, RuntimeError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    print(f"{out / 'evidence.json'}\n{out / 'evidence.html'}")
    return 0


def show_plan(sizes: Sizes, work: Path, workers: int) -> None:
    """Every run, whether it is done, and what all the others take at full size."""
    table = Table("run", "state", "core-seconds")
    missing = 0
    for label, spec, done in first_look(sizes, work).values():
        table.add_row(label, "done" if done else "to do", str(SECONDS[spec.config]))
        missing += 0 if done else SECONDS[spec.config]
    Console(width=100).print(table)
    print(f"about {missing:,} core-seconds to do at full size, {missing / workers / 60:.0f} minutes by {workers} quiet cores")


def show_verdicts(verdicts: dict[str, Verdict]) -> None:
    table = Table("", "claim", "here it", "decided by")
    for claim in CLAIMS:
        verdict = verdicts[claim.letter]
        numbers = "\n".join(f"{name}: {one}" for name, one in verdict.decided_by.items())
        table.add_row(claim.letter, claim.title, verdict.outcome, numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
