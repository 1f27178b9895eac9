"""python -m tests.invariants [--kind dense|moe] [--split NAME ...] [--json FILE]: every split against one rank."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.invariants.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Comparison, Row, to_json
from tests.invariants.splits import SPLITS


def main(arguments: list[str] | None = None) -> int:
    names = [split.name for split in SPLITS]
    parser = argparse.ArgumentParser(prog="python -m tests.invariants", description=__doc__)
    parser.add_argument("--kind", choices=("dense", "moe"), help="default: both")
    parser.add_argument("--split", nargs="+", choices=names, metavar="NAME", help="default: all; " + ", ".join(names))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    kinds = (options.kind,) if options.kind else ("dense", "moe")
    start, rows = time.monotonic(), []
    heading = f"{'model':6}{'objective':10}{'split':28}{'loss':>9}{'gradient':>10}{'clipped':>9}  {'export':8}worst tensor"
    print(heading, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(Path(folder))
        for kind in kinds:
            for split in SPLITS:
                if kind in split.kinds and (not options.split or split.name in options.split):
                    for row in comparison.rows(kind, split):
                        rows.append(row)
                        print(_line(row), flush=True)
    if options.json:
        options.json.write_text(to_json(rows) + "\n")
    return _verdict(rows, time.monotonic() - start)


def _line(row: Row) -> str:
    mark = "" if row.passed else "  <-- FAIL"
    return (
        f"{row.kind:6}{row.objective:10}{row.split:28}{row.loss_difference:9.1e}{row.gradient_difference:10.1e}"
        f"{row.clip_fraction:9.3f}  {'bitwise' if row.bitwise else 'DIFFERS':8}{row.tensor}{mark}"
    )


def _verdict(rows: list[Row], seconds: float) -> int:
    failed = [row for row in rows if not row.passed]
    worst = max((row.gradient_difference for row in rows), default=0.0)
    loss = max((row.loss_difference for row in rows), default=0.0)
    verdict = "FAIL" if failed or not rows else "PASS"
    print(
        f"{verdict} {len(rows) - len(failed)} of {len(rows)} rows: largest relative difference of a gradient {worst:.1e} (<= "
        f"{GRADIENT_TOLERANCE:.0e}), of a loss {loss:.1e} (<= {LOSS_TOLERANCE:.0e}), {seconds:.0f} s"
    )
    return 1 if verdict == "FAIL" else 0


if __name__ == "__main__":
    sys.exit(main())
