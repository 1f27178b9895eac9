"""Figures as HTML: each under its title, with a key of its colours, its units, and the same in words."""

from __future__ import annotations

import math
from html import escape

from megapsft.report.figure import Bars, Chart, Cloud, Figure, Grid, Heat, Histogram, Switched, Token
from megapsft.report.svg import coloured, drawing

SMALLEST, LARGEST = 0.7, 2.6  # of the words of a cloud, in em


def figure(shown: Figure) -> str:
    """The <figure> element. All text is escaped."""
    if isinstance(shown, Switched):
        variants = "".join(f'<div class="over over-{escape(axis)}">{_drawn(chart)}</div>' for axis, chart in shown.charts.items())
        first = next(iter(shown.charts.values()))
        return _framed(shown.name, shown.title, _key(first) + f'<div class="overs">{variants}</div>', first.note)
    wide = " wide" if isinstance(shown, Heat | Cloud | Grid) else ""
    return _framed(shown.name, shown.title, _key(shown) + _drawn(shown), shown.note, wide)


def _framed(name: str, title: str, content: str, note: str, wide: str = "") -> str:
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    heading = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure id="figure-{escape(name)}" class="shown{wide}">{heading}{content}{said}</figure>'


def _key(shown: Figure) -> str:
    """Which colour is what, where there are several."""
    if isinstance(shown, Chart):
        entries = [(line.name, coloured(line.colour), "dashed" if line.dashed else "") for line in shown.lines]
    elif isinstance(shown, Histogram | Bars):
        entries = [(series.name, coloured(series.colour, series.tint), "block") for series in shown.series]
    else:
        return ""
    if len(entries) < 2:
        return ""
    items = "".join(f"<li {colour}><i class='{kind}'></i>{escape(name)}</li>" for name, colour, kind in entries)
    return f'<ul class="key">{items}</ul>'


def _drawn(shown: Figure) -> str:
    if isinstance(shown, Grid):
        return grid(shown)
    if isinstance(shown, Heat):
        return _heat(shown)
    if isinstance(shown, Cloud):
        return _cloud(shown)
    return drawing(shown)


def grid(shown: Grid) -> str:
    """The <table>, which scrolls by itself where it is wider than the page."""
    side = ["class=number" if number in shown.numbers else "" for number in range(len(shown.heading))]
    heading = "".join(f'<th scope="col" {at}>{escape(name)}</th>' for at, name in zip(side, shown.heading, strict=True))
    rows = "".join(
        f"<tr>{''.join(f'<td {at}>{escape(cell)}</td>' for at, cell in zip(side, row, strict=True))}</tr>" for row in shown.rows
    )
    named = escape(f"{shown.title}. {shown.words}")
    return (
        f'<div class="scrolled" tabindex="0" role="region" aria-label="{named}">'
        f"<table><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _heat(shown: Heat) -> str:
    """The text, and what its colours mean. The depth of a colour is in proportion to the number, from 0."""
    tokens = "".join(_token(token, f"--part:{_depth(shown, token.value)}%", _side(token.value)) for token in shown.tokens)
    ends = [("below", shown.low)] * (shown.low < 0) + [("above", shown.high)] * (shown.high > 0)
    key = "".join(f'<li><i class="{side}" style="--part:100%"></i>{value:.4g}</li>' for side, value in ends)
    return f'<ul class="key"><li>{escape(shown.unit)}:</li>{key}</ul><pre class="heat" {_image(shown)}>{tokens}</pre>'


def _side(value: float) -> str:
    return "unknown" if math.isnan(value) else "below" if value < 0 else "above"


def _depth(shown: Heat, value: float) -> int:
    end = shown.low if value < 0 else shown.high
    return 0 if math.isnan(value) or not end else round(100 * min(max(value / end, 0.0), 1.0))


def _cloud(shown: Cloud) -> str:
    """Sizes in proportion to the square root of the value, so that areas are in proportion to it."""
    tokens = [token for token in shown.tokens if token.value > 0]
    most = max((token.value for token in tokens), default=1.0)
    sizes = [SMALLEST + (LARGEST - SMALLEST) * math.sqrt(token.value / most) for token in tokens]
    words = " ".join(_token(token, f"font-size:{size:.2f}em", "word") for token, size in zip(tokens, sizes, strict=True))
    return f'<div class="cloud" {_image(shown)}>{words or "none"}</div><p class="soft">{escape(shown.unit)}</p>'


def _token(token: Token, style: str, kind: str) -> str:
    hover = f"{token.value:.4g}" + (f"; {token.hover}" if token.hover else "")
    return f'<span class="{kind}" style="{style}" title="{escape(hover)}">{escape(token.text)}</span>'


def _image(shown: Heat | Cloud) -> str:
    return f'role="img" aria-label="{escape(f"{shown.title}. {shown.words}")}"'


__all__ = ["figure", "grid"]
