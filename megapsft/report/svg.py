"""Small pictures as inline SVG: each a figure with a title, its units, and the same in words for who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 190  # of the view box: text stays readable where a phone shows it
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 26, 34


def figure(title: str, words: str, content: str, height: int = HEIGHT) -> str:
    """The drawing under its title.

    Args:
        words: what can be seen in it.
    """
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}. {words}", quote=True)}">'
        f"<title>{escape(words)}</title>{content}</svg></figure>"
    )


def columns(edges: Sequence[int], counts: Sequence[int], limits: Mapping[str, int], unit: str, count_unit: str) -> str:
    """A column for each count over its interval of `edges`, and a dashed line for each limit.

    Args:
        unit: of the edges and limits.
        count_unit: of the counts.
    """
    end = max(edges[-1], *(round(limit * 1.02) for limit in limits.values())) if limits else edges[-1]
    most = max(counts)

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / end, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most, 1)

    drawn = []
    for number in (0, most / 2, most):
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(number)}" y2="{y(number)}"/>')
        drawn.append(f'<text x="{LEFT - 4}" y="{y(number) + 4}" text-anchor="end">{number:,.0f}</text>')
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        width = max(round(x(high) - x(low) - 1, 1), 0.5)
        box = f'x="{x(low)}" y="{y(count)}" width="{width}" height="{round(y(0) - y(count), 1)}"'
        drawn.append(f'<rect class="bar" {box}><title>{low} to {high - 1} {unit}: {count:,} {count_unit}</title></rect>')
    for name, limit in limits.items():
        after = x(limit) < WIDTH / 2
        drawn.append(f'<line class="limit" x1="{x(limit)}" x2="{x(limit)}" y1="{TOP - 8}" y2="{y(0)}"/>')
        place = f'x="{x(limit) + (3 if after else -3)}" y="{TOP - 12}" text-anchor="{"start" if after else "end"}"'
        drawn.append(f'<text class="limit-name" {place}>{escape(name)} = {limit:,}</text>')
    for number in (0, end // 2, end):
        anchor = "start" if number == 0 else "end" if number == end else "middle"
        drawn.append(f'<text x="{x(number)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{number:,}</text>')
    drawn.append(f'<text x="{x(end / 2)}" y="{HEIGHT - 3}" text-anchor="middle">{escape(unit)}</text>')
    drawn.append(f'<text x="2" y="12">{escape(count_unit)}</text>')
    return "".join(drawn)


def shares(rows: Sequence[tuple[str, float, float]]) -> str:
    """A bar for each (name, value, part of it that is filled); lengths in proportion to the largest value."""
    most = max(value for _, value, _ in rows)
    drawn = []
    for number, (name, value, part) in enumerate(rows):
        top, full = number * 34, (WIDTH - 8) * value / most
        drawn.append(f'<text x="4" y="{top + 13}">{escape(name)}</text>')
        drawn.append(f'<rect class="rest" x="4" y="{top + 18}" width="{max(full, 1):.1f}" height="11"/>')
        drawn.append(f'<rect class="bar" x="4" y="{top + 18}" width="{full * part:.1f}" height="11"/>')
    return "".join(drawn)


def height_of_shares(rows: Sequence[object]) -> int:
    return 34 * len(rows) + 2
