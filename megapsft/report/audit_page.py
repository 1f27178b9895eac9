"""An audit as one page of HTML that needs nothing else: no network, no scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megapsft.audit.audit import Audit, ShownRow, ShownSample, Warned
from megapsft.audit.lengths import Histogram, Packing
from megapsft.audit.rows import DROPS
from megapsft.report.audit import MEANINGS, head, overview_rows, shortened, title, visible
from megapsft.report.svg import columns, figure, height_of_shares, shares

HEAD, TAIL = 3000, 1000  # characters of a long span that are on the page
NUMBERS = 60  # rows that a table names
EXAMPLES = 5  # of what a rule found, in words

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5b5b5b; --paper: #fdfdfb; --line: #d5d3cc; --bar: #0072b2;
  --rest: #cfd8df; --limit: #b34700; --trained: #d6ebf7; --trained-ink: #003b5c; --masked: #fbf0cf; --truncated: #f6e1ee;
  --dropped: #f9dfd2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e0; --soft: #aaa79f; --paper: #17181a; --line: #3b3d41; --bar: #56b4e9;
  --rest: #3a4650; --limit: #f0935a; --trained: #123a52; --trained-ink: #c9e8fb; --masked: #4a3d10; --truncated: #4b2a40;
  --dropped: #512a18; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } h4 { font-size: .9rem; margin: .6rem 0 .2rem; font-weight: 600; }
a { color: inherit; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-top: 1px solid var(--line); }
h2 + table tr:first-child > * { border-top: 0; } th[scope=row] { white-space: nowrap; overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; overflow-wrap: normal; }
p.soft, td p.soft, .soft { color: var(--soft); margin: .2rem 0; }
td p { margin: .2rem 0; }
@media (max-width: 36rem) { thead { display: none; } td.name, td.number, td.name + td.number + td { display: block; padding: 0; }
  td.name { padding-top: .5rem; } td.number, td.name + td.number + td { border: 0; text-align: left; }
  td.number::before { content: attr(data-unit) ": "; } }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; font-weight: 600; min-height: 2.6em; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
svg .bar { fill: var(--bar); } svg .rest { fill: var(--rest); } svg .grid { stroke: var(--line); }
svg .limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 3; } svg .limit-name { fill: var(--limit); }
pre { white-space: pre-wrap; margin: 0; padding: .6rem; border: 1px solid var(--line); font: .82rem/1.6 ui-monospace, monospace; }
.prompt { color: var(--soft); }
.trained { background: var(--trained); color: var(--trained-ink); text-decoration: underline 2px var(--bar);
  text-underline-offset: 3px; }
.masked { background: var(--masked); text-decoration: underline dotted 2px; text-underline-offset: 3px; }
.truncated { background: var(--truncated); text-decoration: line-through; }
.dropped { background: var(--dropped); text-decoration: underline wavy 1px; text-underline-offset: 3px; }
.special { border: 1px solid currentColor; border-radius: 3px; font-weight: 700; padding: 0 2px; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; }
.warning { border-left: 4px solid var(--limit); padding-left: .6rem; font-size: .9rem; margin: .4rem 0; }
"""


def write_page(audit: Audit, path: Path) -> None:
    """The page, the old file or the new one; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(page(audit), encoding="utf-8")
    os.replace(beside, path)


def page(audit: Audit) -> str:
    name = escape(visible(audit.path))
    body = [
        f"<header><h1>Audit of {name}</h1><p class=soft>{escape(audit.kind)} for {escape(audit.objective)}, "
        f"with the tokenizer and chat template of {escape(visible(audit.model))}</p></header><main>",
        section("Counts", definitions(overview_rows(audit))),
        section("Warnings", warnings(audit)),
        section("Lengths", f"<div class=figures>{''.join(map(lengths, audit.histograms))}</div>") if audit.histograms else "",
        section("Loss mask", f"<div class=figures>{of_roles(audit)}{packed(audit.packing)}</div>") if audit.roles else "",
        section("Not trained", drops(audit)) if audit.drops else "",
        section("Rows", legend() + "".join(map(article, audit.shown))) if audit.shown else "",
        section("What was looked at", "".join(f"<p class=soft>{escape(note)}</p>" for note in audit.notes)),
        "</main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Audit of {name}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def section(name: str, content: str) -> str:
    return f'<section id="{name.lower().replace(" ", "-")}"><h2>{name}</h2>{content}</section>'


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f"<table>{cells}</table>"


def warnings(audit: Audit) -> str:
    """A row for each rule, with links to the rows of the file that are on the page."""
    if not audit.warnings:
        return "<p>No rule found anything.</p>"
    shown = {row.number for row in audit.shown}
    lines = "".join(warning(warned, shown) for warned in audit.warnings)
    heading = '<tr><th scope="col">rule</th><th scope="col" class=number>rows</th><th scope="col">where, and what</th></tr>'
    return f"<table><thead>{heading}</thead><tbody>{lines}</tbody></table>"


def warning(warned: Warned, shown: set[int]) -> str:
    examples = "".join(f"<p>{link(row, shown, 'row ')}: {escape(visible(what))}</p>" for row, what in warned.found[:EXAMPLES])
    count = f"<td class=number data-unit=rows>{len(warned.rows):,}</td>"
    rule = warned.rule
    return (
        f"<tr><td class=name><strong>{escape(rule.name)}</strong></td>{count}"
        f"<td><p>{escape(rule.meaning)} {escape(rule.remedy)}</p>{examples}"
        f"<p class=soft>rows {linked(warned.rows, shown)}</p></td></tr>"
    )


def linked(rows: Sequence[int], shown: set[int]) -> str:
    """The first numbers, those of rows on the page as links; and how many more there are."""
    more = f" and {len(rows) - NUMBERS:,} more" if len(rows) > NUMBERS else ""
    return ", ".join(link(row, shown) for row in rows[:NUMBERS]) + more


def link(row: int, shown: set[int], before: str = "") -> str:
    return f'<a href="#row-{row}">{before}{row}</a>' if row in shown else f"{before}{row}"


def lengths(histogram: Histogram) -> str:
    """The columns; their unit is the token, and that of their heights what has such a length."""
    of = "rows" if histogram.name == "prompt" else "samples"
    limits = "".join(f"; {name} is {tokens:,}" for name, tokens in histogram.limits.items())
    words = f"{sum(histogram.counts):,} {of}, most of them around {mode(histogram)} tokens{limits}"
    caption = title(histogram)
    drawing = columns(histogram.edges, histogram.counts, histogram.limits, "tokens", of)
    return figure(caption[0].upper() + caption[1:], words, drawing)


def mode(histogram: Histogram) -> int:
    """The middle of the highest bar."""
    highest = max(range(len(histogram.counts)), key=histogram.counts.__getitem__)
    return (histogram.edges[highest] + histogram.edges[highest + 1]) // 2


def of_roles(audit: Audit) -> str:
    parts = [(role, role.trained / role.tokens) for role in audit.roles]
    rows = [(f"{role.role}: {role.tokens:,} tokens, {part:.1%} trained", role.tokens, part) for role, part in parts]
    words = "; ".join(name for name, _, _ in rows)
    return figure("Tokens by role; in blue those with a loss", words, shares(rows), height_of_shares(rows))


def packed(packing: Packing | None) -> str:
    if packing is None:
        return ""
    ways = [("as planned", packing.positions), ("one sample a row", packing.unpacked_positions)]
    parts = [(name, positions, packing.tokens / positions) for name, positions in ways]
    rows = [(f"{name}: {positions:,} positions, {part:.1%} filled", positions, part) for name, positions, part in parts]
    words, caption = "; ".join(name for name, _, _ in rows), "Positions that go through the model; in blue those without padding"
    return figure(caption, words, shares(rows), height_of_shares(rows))


def drops(audit: Audit) -> str:
    shown = {row.number for row in audit.shown}
    lines = "".join(
        f"<tr><td class=name><strong>{escape(drop.reason)}</strong></td>"
        f"<td class=number data-unit=samples>{drop.samples:,}</td>"
        f"<td><p>{escape(DROPS[drop.reason])}</p><p class=soft>rows {linked(drop.rows, shown)}</p></td></tr>"
        for drop in audit.drops
    )
    heading = '<tr><th scope="col">why</th><th scope="col" class=number>samples</th><th scope="col">rows</th></tr>'
    return f"<table><thead>{heading}</thead><tbody>{lines}</tbody></table>"


def legend() -> str:
    kinds = "".join(f'<li><span class="{kind}">{kind}</span> {escape(meaning)}</li>' for kind, meaning in MEANINGS.items())
    return f'<ul class=legend aria-label="legend">{kinds}<li><span class=special>special token</span></li></ul>'


def article(row: ShownRow) -> str:
    said = ((escape(name), escape(visible(what))) for name, what in row.warnings)
    found = "".join(f"<p class=warning><strong>{name}</strong>: {what}</p>" for name, what in said)
    samples = "".join(f"<h4>{escape(head(sample))}</h4>{text(sample)}" for sample in row.samples)
    return f'<article id="row-{row.number}"><h3>Row {row.number}</h3>{found}{samples}</article>'


def text(sample: ShownSample) -> str:
    """The tokens of the sample, each span saying by its class and its title what it is."""
    parts = []
    for span in sample.spans:
        special = " special" if span.special else ""
        said = f"{span.kind}: {span.tokens} token{'s' if span.tokens != 1 else ''}, {MEANINGS[span.kind]}"
        parts.append(f'<span class="{span.kind}{special}" title="{said}">{escape(shortened(span, HEAD, TAIL))}</span>')
    return f"<pre>{''.join(parts)}</pre>"
