"""Curves of a run as SVG figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from utils.spacing import evenly_spaced

CHART_POINTS = 300
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 360, 190, 46, 16, 22, 10
LOG_SCALE_RATIO = 50

Point = tuple[int, float | None]
"""(step, value). The value is None if it was not finite."""


def chart(name: str, points: Sequence[Point], words: str = "") -> str:
    """Draw one metric as an SVG: values and moving average, on a log scale if the values span decades.

    ``words`` stand below it.

    At values that were not finite, the line has a gap and there is a mark at the bottom.
    """
    finite = [(step, value) for step, value in points if value is not None]
    title = escape(name.replace("_", " "))
    below = f"<p>{escape(words)}</p>" if words else ""
    if not finite:
        return f"<figure><figcaption><b>{title}</b> <span>never finite</span></figcaption>{below}</figure>"
    lost = [step for step, value in points if value is None]
    raw, smooth = _thin(finite), _thin(_smooth(finite))
    axis = _Axis.around([value for _, value in raw])
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def path(line: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(step):.1f} {axis.y(value):.1f}" for step, value in line)

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.y(tick):.1f}" y2="{axis.y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{axis.y(tick) + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        for tick in axis.ticks
    )
    steps = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{short_number(tick)}</text>'
        for tick in _ticks(first, last, 4)
    )
    marks = "".join(f'<path class="lost" d="M{x(step):.1f} {HEIGHT - BOTTOM}v-8"/>' for step in lost[:CHART_POINTS])
    data = escape(json.dumps([[round(x(step), 1), step, short_number(value)] for step, value in raw]))
    return (
        f"<figure><figcaption><b>{title}</b> <span>{short_number(smooth[-1][1])}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by step" data-points="{data}">'
        f'<g class="grid">{grid}{steps}</g><path class="raw" d="{path(raw)}"/><path class="smooth" d="{path(smooth)}"/>'
        f'{marks}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>{below}</figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """The value axis of a chart: linear, or logarithmic for positive values over decades."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float]) -> _Axis:
        """Make an axis that contains all values."""
        low, high = min(values), max(values)
        log = low > 0 and high / low > LOG_SCALE_RATIO
        if log:
            return cls(math.log10(low), math.log10(high), True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(min(low, 0.0) if 0 <= low < 0.3 * high else low - room, high + room, False)

    def y(self, value: float) -> float:
        place = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - place)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
            return [10.0**decade for decade in decades[:: max(1, len(decades) // 4)]]
        return _ticks(self.low, self.high, 4)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return about ``wanted`` round numbers from low to high."""
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = scale * min((1, 2, 5, 10), key=lambda factor: abs(factor * scale - rough))
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return the moving average over a twentieth of the run."""
    reach = max(1, len(points) // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    averaged = []
    for index, (step, _) in enumerate(points):
        low, high = max(0, index - reach), min(len(points), index + reach + 1)
        averaged.append((step, (sums[high] - sums[low]) / (high - low)))
    return averaged


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [points[index] for index in evenly_spaced(len(points), CHART_POINTS)]


def short_number(value: float) -> str:
    """Format a number with about three digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
