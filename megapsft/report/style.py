"""What every page that we write shares: one stylesheet, light and dark, and a frame that needs nothing else: no network."""

from __future__ import annotations

from html import escape

from megapsft.report.picture import LINES

DARK = ("#56b4e9", "#f58a4b", "#2fc598", "#e3a0c8", "#9ad7ff", "#f2bd45")  # LINES, light enough for a dark page

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5b5b5b; --paper: #fdfdfb; --card: #ffffff; --line: #dcdad3;
  --rest: #cfd8df; --limit: #b34700; --span: #f3e9d2; --grey: #767676; @LIGHT@ }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e0; --soft: #aaa79f; --paper: #17181a; --card: #1f2023; --line: #3b3d41;
  --rest: #3a4650; --limit: #f0935a; --span: #35301f; --grey: #9a9a9a; @DARK@ } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } h4 { font-size: .9rem; margin: .6rem 0 .2rem; font-weight: 600; }
a { color: inherit; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-top: 1px solid var(--line); }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.soft { color: var(--soft); margin: .2rem 0; } p.soft { font-size: .8rem; line-height: 1.4; }
.scrolled { overflow-x: auto; } .scrolled thead th { border-top: 0; white-space: nowrap; overflow-wrap: normal; }
.scrolled td { white-space: nowrap; } .scrolled td.long { white-space: normal; min-width: 16rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; }
figcaption { font-size: .9rem; font-weight: 600; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .grey { --c: var(--grey); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
svg .name { fill: var(--ink); } svg .grid { stroke: var(--line); } svg .span { fill: var(--span); }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
svg .line.dashed { stroke-dasharray: 5 3; } svg .error { fill: none; stroke: var(--c); }
svg .band { fill: var(--c); fill-opacity: .16; } svg .bar, svg .dot { fill: var(--c); }
svg .hover { fill: transparent; } svg .hover:hover { fill: var(--c); }
svg .mark { stroke: var(--c); stroke-dasharray: 2 3; } svg .mark-name { font-size: 9px; }
svg g .mark-name { fill: var(--c); } svg .whisker { fill: none; stroke: var(--ink); }
ul.key { list-style: none; padding: 0; margin: .2rem 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; }
.key i { display: inline-block; width: 1.1rem; margin-right: .35rem; vertical-align: .25em; border-top: 2px solid var(--c); }
.key i.dashed { border-top-style: dashed; }
.key i.block { height: .7em; vertical-align: -.05em; background: var(--c); border: 0; width: .7em; }
.key i.below, .key i.above { height: .8em; border: 0; vertical-align: -.1em; }
.above { background: color-mix(in srgb, var(--c1) calc(var(--part) * .75), transparent); }
.below { background: color-mix(in srgb, var(--c0) calc(var(--part) * .75), transparent); }
pre { white-space: pre-wrap; margin: 0; padding: .6rem; border: 1px solid var(--line); font: .82rem/1.6 ui-monospace, monospace; }
.cloud { text-align: center; line-height: 1.3; } .cloud .word { font-family: ui-monospace, monospace; padding: 0 .15em; }
.cloud .word:nth-child(3n) { color: var(--c0); } .cloud .word:nth-child(3n + 1) { color: var(--c1); }
.cloud .word:nth-child(3n + 2) { color: var(--c2); }
""".replace("@LIGHT@", " ".join(f"--c{number}: {colour};" for number, colour in enumerate(LINES))).replace(
    "@DARK@", " ".join(f"--c{number}: {colour};" for number, colour in enumerate(DARK))
)


def document(title: str, body: str, style: str = "") -> str:
    """The whole page.

    Args:
        title: plain text.
        body: what stands in <body>, HTML.
        style: what this page has beside STYLE.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def section(name: str, content: str) -> str:
    """A part of the page under its heading; `name` is plain text."""
    return f'<section id="{anchor(name)}"><h2>{escape(name)}</h2>{content}</section>'


def anchor(name: str) -> str:
    """What links to a section name."""
    return escape("-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split()))


__all__ = ["anchor", "document", "section"]
