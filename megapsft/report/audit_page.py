"""An audit as one page of HTML that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from megapsft.audit.audit import Audit, ShownRow, ShownSample, Warned
from megapsft.audit.lengths import Histogram as Lengths
from megapsft.audit.lengths import Packing
from megapsft.audit.rows import DROPS
from megapsft.output.whole import write_whole
from megapsft.report.audit import MEANINGS, head, overview_rows, shortened, title, visible
from megapsft.report.figure import Bars, Histogram, Mark, Series
from megapsft.report.html import figure
from megapsft.report.style import document, section

HEAD, TAIL = 3000, 1000  # characters of a long span that are on the page
NUMBERS = 60  # rows that a table names
EXAMPLES = 5  # of what a rule found, in words

STYLE = """
:root { --trained: #d6ebf7; --trained-ink: #003b5c; --masked: #fbf0cf; --truncated: #f6e1ee; --dropped: #f9dfd2; }
@media (prefers-color-scheme: dark) { :root { --trained: #123a52; --trained-ink: #c9e8fb; --masked: #4a3d10; --truncated: #4b2a40;
  --dropped: #512a18; } }
h2 + table tr:first-child > * { border-top: 0; } th[scope=row] { white-space: nowrap; overflow-wrap: normal; }
td.name { white-space: nowrap; overflow-wrap: normal; } td p { margin: .2rem 0; }
@media (max-width: 36rem) { thead { display: none; } td.name, td.number, td.name + td.number + td { display: block; padding: 0; }
  td.name { padding-top: .5rem; } td.number, td.name + td.number + td { border: 0; text-align: left; }
  td.number::before { content: attr(data-unit) ": "; } }
.prompt { color: var(--soft); }
.trained { background: var(--trained); color: var(--trained-ink); text-decoration: underline 2px var(--c0);
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
    write_whole(path, page(audit))


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
    return document(f"Audit of {visible(audit.path)}", "".join(body), STYLE)


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


def lengths(found: Lengths) -> str:
    """The columns; their unit is the token, and that of their heights what has such a length."""
    said = title(found)
    return figure(
        Histogram(
            name=f"length-of-{found.name}",
            title=said[0].upper() + said[1:],
            x_label="tokens",
            y_label="rows" if found.name == "prompt" else "samples",
            edges=found.edges,
            series=[Series(name=found.name, values=found.counts)],
            limits=[Mark(tokens, name) for name, tokens in found.limits.items()],
        )
    )


def of_roles(audit: Audit) -> str:
    names = [f"{role.role}: {role.tokens:,} tokens, {role.trained / role.tokens:.1%} trained" for role in audit.roles]
    parts = {
        "with a loss": [role.trained for role in audit.roles],
        "without": [role.tokens - role.trained for role in audit.roles],
    }
    return figure(filled("roles", "Tokens by role", "role", "tokens", names, parts))


def packed(packing: Packing | None) -> str:
    if packing is None:
        return ""
    ways = [("as planned", packing.positions), ("one sample a row", packing.unpacked_positions)]
    names = [f"{name}: {positions:,} positions, {packing.tokens / positions:.1%} filled" for name, positions in ways]
    parts = {"tokens": [packing.tokens] * len(ways), "padding": [positions - packing.tokens for _, positions in ways]}
    return figure(filled("packing", "Positions that go through the model", "way of packing", "positions", names, parts))


def filled(name: str, title: str, of: str, unit: str, names: Sequence[str], parts: Mapping[str, Sequence[int]]) -> Bars:
    """Bars of two parts, the first in colour."""
    series = [Series(name=part, values=values, colour=0 if not n else None) for n, (part, values) in enumerate(parts.items())]
    return Bars(name=name, title=title, x_label=of, y_label=unit, names=names, series=series, stacked=True)


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
