"""The verdict on the nodes of a job, for its log."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from megapsft.cluster.preflight.examine import ALL_REDUCE
from megapsft.cluster.preflight.judge import BAD_NODES, GOOD, TRY_PAIRS, Verdict

MOST_ROWS = 20


def show_verdict(verdict: Verdict, nodes: Sequence[str]) -> None:
    """Print one line where all is good, else what is wrong, and who is to blame."""
    console = Console(width=200, highlight=False)
    if verdict.code == GOOD:
        told = [finding.value for finding in verdict.good if finding.check in ("gpus", ALL_REDUCE)]
        console.print(f"preflight: {len(nodes)} nodes are good: {'; '.join(told)}", soft_wrap=True, markup=False)
        return
    if verdict.code == TRY_PAIRS:  # the verdict after that has it all
        said = f"{verdict.wrong[0].node}: {verdict.wrong[0].value}; pairs of nodes are tried"
        console.print(f"preflight: ranks do not reach one another: {said}", soft_wrap=True, markup=False)
        return
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("node", "check", "found", "rule", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in verdict.wrong[:MOST_ROWS]:
        table.add_row(finding.node, finding.check, finding.value, finding.rule, finding.remedy)
    console.print(table, markup=False)
    if len(verdict.wrong) > MOST_ROWS:
        console.print(f"and {len(verdict.wrong) - MOST_ROWS} more")
    bad = f"bad: {', '.join(verdict.bad)}"
    said = bad if verdict.code == BAD_NODES else "something is wrong, and no node is to blame for it"
    console.print(f"preflight: {said}", soft_wrap=True, markup=False)
