"""A plot of several lines as an SVG file, which a web page and a Markdown page show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from scripts.reproduction.statistics import Interval

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 60, 250, 40, 46
COLOURS = ("#1b6ac9", "#d1495b", "#2e8b57", "#e08e0b", "#7a4fb5", "#0f8b8d", "#8a5a44", "#5a6270", "#c2185b", "#6b8e23")
Scale = Callable[[float], float]
STYLE = "font-family:system-ui,sans-serif;font-size:13px;background:#fff"


def line_plot(title: str, unit: str, lines: Mapping[str, Mapping[int, Interval]]) -> str:
    """Return an SVG with one line and its intervals for each name: length -> value. The lengths are on a log scale."""
    lengths = sorted({length for line in lines.values() for length in line})
    highest = max((value.high for line in lines.values() for value in line.values()), default=1.0) or 1.0
    top = 1.0 if highest <= 1.0 and unit == "share" else highest * 1.05

    def x(length: float) -> float:
        share = math.log(length / lengths[0]) / max(math.log(lengths[-1] / lengths[0]), 1e-9)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value / top, 0.0), 1.0)

    parts = [f'<text x="{LEFT}" y="22" font-weight="600">{escape(title)} ({escape(unit)})</text>']
    for tick in range(5):
        value = top * tick / 4
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for length in lengths:
        parts.append(f'<text x="{x(length):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{length}x</text>')
    for place, (name, line) in enumerate(lines.items()):
        parts += _line(place, name, sorted(line.items()), x, y)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}" role="img" '
        f'aria-label="{escape(title)}">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _line(place: int, name: str, points: Sequence[tuple[int, Interval]], x: Scale, y: Scale) -> list[str]:
    """Return the line of a name, its intervals and its entry in the legend."""
    colour, shift = COLOURS[place % len(COLOURS)], 2 * (place % 5 - 2)  # shifted: intervals stay apart
    path = "L".join(f"{x(length) + shift:.1f} {y(value.mean):.1f}" for length, value in points)
    bars = "".join(f"M{x(length) + shift:.1f} {y(value.low):.1f}V{y(value.high):.1f}" for length, value in points)
    height = TOP + 10 + 20 * place
    return [
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<path d="{bars}" stroke="{colour}" stroke-width="1.2" opacity=".6"/>',
        f'<path d="M{WIDTH - RIGHT + 22} {height}h22" stroke="{colour}" stroke-width="3"/>',
        f'<text x="{WIDTH - RIGHT + 52}" y="{height + 4}">{escape(name)}</text>',
    ]
