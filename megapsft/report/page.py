"""A report as one page of HTML that needs nothing else: no network, no scripts. The stylesheet switches what is on the x axes."""

from __future__ import annotations

from html import escape
from pathlib import Path

from megapsft.output.whole import write_whole
from megapsft.report.audit import visible
from megapsft.report.figure import Switched
from megapsft.report.folders import Shown
from megapsft.report.html import figure
from megapsft.report.run import AXES
from megapsft.report.section import Section
from megapsft.report.sections import sections
from megapsft.report.style import anchor, document, section

FIRST = next(iter(AXES))
STYLE = """
body { max-width: 84rem; }
header h1 { margin-bottom: .2rem; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
main > section > .figures { margin-top: .6rem; }
figure.shown { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem; }
.switch { position: sticky; top: 0; z-index: 1; margin: 0 -1rem; padding: .4rem 1rem; background: var(--paper); border: 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .9rem; }
.switch legend { float: left; padding: 0; } .switch label { cursor: pointer; white-space: nowrap; }
.runs { list-style: none; padding: 0; margin: .2rem 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .9rem; }
.over:not(:first-child) { display: none; }
section { scroll-margin-top: 3rem; }
""" + "".join(
    f"body:has(#axis-{axis}:checked) {{ .over {{ display: none; }} .over-{axis} {{ display: block; }} }}\n" for axis in AXES
)


def write_report(shown: Shown, path: Path) -> None:
    """The page, the old file or the new one; folders are made."""
    write_whole(path, page(shown))


def page(shown: Shown) -> str:
    """All sections that have anything to show, after a table of contents."""
    names = [one.name for one in (*shown.runs, *shown.pipelines, *shown.sweeps, *shown.measurements)]
    title = visible(f"Report of {', '.join(dict.fromkeys(names))}")
    found = sections(shown)
    contents = "".join(f'<li><a href="#{anchor(part.name)}">{escape(part.name)}</a></li>' for part in found)
    over = any(isinstance(one, Switched) for part in found for one in part.figures)
    body = [
        f"<header><h1>{escape(title)}</h1><nav aria-label='contents'><ul>{contents}</ul></nav></header>",
        switch() if over else "",
        "<main>",
        *(section(part.name, content(part)) for part in found),
        "</main>",
    ]
    return document(title, visible("".join(body)), STYLE)


def content(part: Section) -> str:
    said = f'<p class="soft">{escape(part.note)}</p>' if part.note else ""
    return f'{said}<div class="figures">{"".join(map(figure, part.figures))}</div>'


def switch() -> str:
    """What is on the x axes, to be chosen; the first of the choices where the browser cannot."""
    choices = "".join(
        f'<label><input type="radio" name="axis" id="axis-{axis}"{" checked" if axis == FIRST else ""}> {counted}</label>'
        for axis, counted in AXES.items()
    )
    return f'<fieldset class="switch"><legend>Over</legend>{choices}</fieldset>'


__all__ = ["page", "write_report"]
