"""An audit on the terminal: counts, warnings by rule, and rows with what is trained of them in colour and in brackets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megapsft.audit.audit import Audit, ShownRow, ShownSample
from megapsft.audit.lengths import Histogram
from megapsft.audit.spans import Kind, Span
from megapsft.output.whole import write_whole

MARKS: dict[Kind, tuple[str, str]] = {  # around tokens of a kind, so that it can be read without colours
    "prompt": ("", ""),
    "trained": ("{+", "+}"),
    "masked": ("{~", "~}"),
    "truncated": ("{>", "<}"),
    "dropped": ("{-", "-}"),
}
MEANINGS: dict[Kind, str] = {
    "prompt": "read, not trained",
    "trained": "has a loss",
    "masked": "of the response, without a loss",
    "truncated": "cut off",
    "dropped": "of what is not trained at all",
}
STYLES: dict[Kind, str] = {
    "prompt": "bright_black",
    "trained": "bold cyan",
    "masked": "yellow",
    "truncated": "magenta",
    "dropped": "red",
}
UNPRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff]")
HEAD, TAIL = 500, 200  # characters of a long span that are printed
NUMBERS = 12  # rows that a table names
BAR = 40  # characters


def show_audit(audit: Audit, console: Console | None = None) -> None:
    """Print all of it."""
    console = console or Console(highlight=False)
    console.print(overview(audit))
    for histogram in audit.histograms:
        console.print(bars(histogram))
    if audit.drops:
        console.print(drops(audit))
    if audit.shown:
        console.print(legend(), soft_wrap=True)
    for row in audit.shown:
        console.rule(f"row {row.number}", align="left", style="default")
        for line in lines(row):
            console.print(line, soft_wrap=True)
    for note in audit.notes:
        console.print(f"[yellow]note:[/] {note}")
    console.print(warnings(audit) if audit.warnings else Text("no warnings", style="bold"))


def write_audit(audit: Audit, path: Path) -> None:
    """All of it as JSON; folders are made."""
    write_whole(path, json.dumps(audit.to_dict(), indent=1, ensure_ascii=False) + "\n")


def overview(audit: Audit) -> Table:
    table = Table(show_header=False, title=f"{audit.path}: {audit.kind} for {audit.objective}")
    table.add_column(style="bold")
    table.add_column()
    for name, text in overview_rows(audit):
        table.add_row(name, text)
    return table


def overview_rows(audit: Audit) -> list[tuple[str, str]]:
    """(name, text) of the counts."""
    sampled = audit.kind == "prompts"
    found = [("rows", f"{audit.rows_trained:,} of {audit.rows:,} go into training")]
    if audit.samples != audit.rows:
        found.append(("samples", f"{audit.samples_trained:,} of {audit.samples:,}"))
    found.append(("truncated", f"{audit.truncated:,}"))
    part = f"; {audit.tokens_trained / audit.tokens:.1%}" if audit.tokens else ""
    found.append(("tokens", f"{audit.tokens:,}, {audit.tokens_trained:,} of them trained{part}"))
    found += [
        (f"  {role.role}", f"{role.tokens:,}, {role.trained:,} of them trained; {role.trained / role.tokens:.1%}")
        for role in audit.roles
    ]
    if audit.responses:
        found.append(("terminators", f"{audit.one_terminator:,} of {audit.responses:,} whole responses end with exactly one"))
    if audit.packing is not None:
        pack = audit.packing
        found.append(
            ("packing", f"{pack.filled:.1%} of {pack.positions:,} positions filled, {1 - pack.filled:.1%} padding; "
                        f"{pack.microbatches:,} microbatches of {pack.updates:,} update(s), the least filled {pack.worst:.1%}")
        )  # fmt: skip
        alone = pack.tokens / pack.unpacked_positions
        found.append(("", f"up to {pack.longest:,} positions; one sample a row would fill {alone:.1%}"))
    elif sampled:
        found.append(("packing", "not known before responses are sampled"))
    return found


def bars(histogram: Histogram) -> Text:
    """A bar a line, widths in proportion; limits are lines of their own."""
    most = max(histogram.counts)
    text = Text(f"\n{title(histogram)}\n", style="bold")
    waiting = sorted(histogram.limits.items(), key=lambda limit: limit[1])
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        while waiting and waiting[0][1] < high:
            name, tokens = waiting.pop(0)
            text.append(f"{'':>6} ─── {name}={tokens}\n", style="bold red")
        block = "█" * max(round(BAR * count / most), 1 if count else 0)
        text.append(f"{low:>6} {block} {count or ''}\n", style="not bold")
    for name, tokens in waiting:
        text.append(f"{'':>6} ... {name}={tokens}\n", style="bold red")
    return text


def title(histogram: Histogram) -> str:
    name = {"prompt": "prompts", "response": "responses", "together": "prompt and response"}[histogram.name]
    spread = f"{histogram.minimum} to {histogram.maximum}, median {histogram.median:g}, 95th percentile {histogram.p95:g}"
    return f"length of {name} in tokens: {spread}"


def drops(audit: Audit) -> Table:
    table = Table(title="not trained", box=box.SIMPLE, title_justify="left")
    for heading in ("why", "samples", "rows"):
        table.add_column(heading, justify="right" if heading == "samples" else "left")
    for drop in audit.drops:
        table.add_row(drop.reason, f"{drop.samples:,}", some(drop.rows))
    return table


def warnings(audit: Audit) -> Table:
    """A line for each rule; its remedy beneath."""
    table = Table(title="warnings", box=box.SIMPLE, title_justify="left", show_lines=False)
    table.add_column("rule", no_wrap=True, style="bold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("where, and what")
    for warned in audit.warnings:
        row, what = warned.found[0]
        told = Text(f"{some(warned.rows)}\n", style="default")
        told.append(f"row {row}: {visible(what)}\n")
        told.append(f"{warned.rule.meaning} {warned.rule.remedy}\n", style="bright_black")
        table.add_row(warned.rule.name, f"{len(warned.rows):,}", told)
    return table


def some(rows: Sequence[int]) -> str:
    """The first numbers, and how many more there are."""
    more = f" and {len(rows) - NUMBERS:,} more" if len(rows) > NUMBERS else ""
    return ", ".join(map(str, rows[:NUMBERS])) + more


def lines(row: ShownRow) -> list[Text]:
    """The samples of a row, each with its head; then the warnings about it."""
    found = []
    for sample in row.samples:
        found += [Text(head(sample), style="bold"), body(sample)]
    return found + [Text(f"warning: {name}: {visible(what)}", style="yellow") for name, what in row.warnings]


def head(sample: ShownSample) -> str:
    reward = "" if sample.reward is None else f", reward {sample.reward:g}"
    plural = "" if sample.terminators == 1 else "s"
    ends = "" if sample.fate == "to be sampled" else f", {sample.terminators} terminator{plural}"
    return f"{sample.name}: {sample.fate}, {sample.tokens:,} tokens, {sample.trained:,} of them trained{ends}{reward}"


def body(sample: ShownSample) -> Text:
    """The text of the sample, marked."""
    text = Text()
    for kind, group in groupby(sample.spans, key=lambda span: span.kind):
        opening, closing = MARKS[kind]
        text.append(opening, style=STYLES[kind])
        for span in group:
            text.append(shortened(span, HEAD, TAIL), style=f"{STYLES[kind]} reverse" if span.special else STYLES[kind])
        text.append(closing, style=STYLES[kind])
    return text


def legend() -> Text:
    text = Text("\n")
    for kind, (opening, closing) in MARKS.items():
        text.append(f"{opening}{kind}{closing}", style=STYLES[kind])
        text.append(f" {MEANINGS[kind]}   ")
    text.append("<special token>", style="reverse")
    return text.append("\n")


def shortened(span: Span, head: int, tail: int) -> str:
    """The text of a span, the middle of a long one left out."""
    text = span.text
    if len(text) > head + tail:
        text = f"{text[:head]} ... {len(text) - head - tail:,} characters ... {text[-tail:]}"
    return visible(text)


def visible(text: str) -> str:
    """With what is not printed, or would steer a terminal, spelt out."""
    return UNPRINTED.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)
