"""A run as one HTML page with nothing outside it: python -m trainer.report LOGDIR writes LOGDIR/report.html.

Curves, seconds per phase, samples over time and the configuration, of a finished run or of one that is still going;
whatever is missing is left out. LOGDIR/metrics.csv holds the curves' numbers.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from utils.cli import exit_code
from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text
from utils.tracking import METRICS_FILE, progress
from utils.video import evenly_spaced, read_video

SECONDS = "seconds"
PHASE = f"{SECONDS}_"
SHOWN_STEPS, SHOWN_PROMPTS = 6, 6
THUMBNAIL_PIXELS = 160
CHART_POINTS = 300
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 360, 190, 46, 16, 22, 10
LOG_SCALE_RATIO = 50

Point = tuple[int, float | None]


@dataclass
class Run:
    """What a log folder holds."""

    name: str
    curves: dict[str, list[Point]]
    """Metric -> (step, value), in order; a value that was not finite is None."""
    config: dict[str, Any]
    """As config.yaml says, empty without one."""
    config_text: str
    samples: list[tuple[int, list[Path]]]
    """(step, videos), in order."""
    updated: float | None
    """When the last metrics were written, in seconds since 1970."""

    @property
    def step(self) -> int:
        """The last step logged."""
        return max((points[-1][0] for points in self.curves.values()), default=0)


def read_run(logdir: str | Path) -> Run:
    """Read a log folder; of a step that was done twice, after an interruption, the last line counts.

    Raises:
        UserError: there is no such folder.
    """
    logdir = Path(logdir)
    if not logdir.is_dir():
        raise UserError(f"{logdir}: no such log folder")
    metrics, config = logdir / METRICS_FILE, logdir / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    videos = {int(folder.name[5:]): sorted(folder.glob("*.mp4")) for folder in logdir.glob("samples/step_[0-9]*")}
    return Run(
        name=logdir.resolve().name,
        curves=read_curves(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
        config=yaml.safe_load(text) or {},
        config_text=text,
        samples=[(step, paths) for step, paths in sorted(videos.items()) if paths],
        updated=metrics.stat().st_mtime if metrics.is_file() else None,
    )


def read_curves(text: str) -> dict[str, list[Point]]:
    """Metric -> points of metrics.jsonl, without lines a killed process left unfinished."""
    lines: dict[int, dict[str, float | None]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            lines[entry.pop("step")] = entry
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
    curves: dict[str, list[Point]] = {}
    for step, entry in sorted(lines.items()):
        for name, value in entry.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def write_report(logdir: str | Path) -> Path:
    """Write report.html and metrics.csv into a log folder; returns the page's path."""
    run = read_run(logdir)
    path = Path(logdir) / "report.html"
    atomic_write_text(path, render(run))
    _write_csv(Path(logdir) / "metrics.csv", run.curves)
    return path


def _write_csv(path: Path, curves: dict[str, list[Point]]) -> None:
    rows: dict[int, dict[str, float | None]] = {}
    for name, points in curves.items():
        for step, value in points:
            rows.setdefault(step, {})[name] = value
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *curves])
        writer.writeheader()
        writer.writerows({"step": step} | row for step, row in sorted(rows.items()))


def render(run: Run) -> str:
    """The page."""
    objective = run.config.get("objective", "")
    sections = [_tiles(run), _curves(run), _phases(run), _samples(run), _config(run)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><h1>{escape(run.name)}</h1><p>{escape(str(objective).replace('_', ' '))}</p></header>"
        f"<main>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _tiles(run: Run) -> str:
    """The figures of the run as a row of tiles."""
    seconds = [value for _, value in run.curves.get(SECONDS, []) if value]
    loop = run.config.get("trainer", {})
    total = loop.get("steps")
    tiles = [("step", f"{run.step}" + (f" of {total}" if total else ""))]
    if seconds:
        middle = statistics.median(seconds[-100:])
        tiles += [("steps per second", _short(1 / middle)), ("computed", _duration(sum(seconds)))]
        batch = loop.get("total_batch_size") or loop.get("batch_size")
        rate = _last(run.curves.get("samples_per_second")) or (batch / middle if batch else None)
        tiles += [("samples per second", _short(rate))] if rate else []
        if total and run.step < total:
            tiles.append(("left", _duration((total - run.step) * middle)))
    memory = [value for _, value in run.curves.get("memory_gb", []) if value]
    tiles += [("peak memory", f"{max(memory):.3g} GB")] if memory else []
    lost = sum(value is None for points in run.curves.values() for _, value in points)
    tiles += [("values not finite", str(lost))] if lost else []
    if run.updated is not None:
        tiles.append(("last metrics", time.strftime("%Y-%m-%d %H:%M", time.localtime(run.updated))))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _curves(run: Run) -> str:
    names = sorted((name for name in run.curves if not name.startswith(PHASE)), key=_chart_order)
    charts = [chart(name, run.curves[name]) for name in names]
    if not charts:
        return _section("Curves", "<p>No metrics yet.</p>")
    return _section("Curves", f'<div class="charts">{"".join(charts)}</div>')


def _chart_order(name: str) -> int:
    """Losses first, then what else the objective logs, then what every run does."""
    if "loss" in name:
        return 0
    return 2 if name.endswith("lr") or name == SECONDS or "memory" in name else 1


def chart(name: str, points: Sequence[Point]) -> str:
    """One metric as a figure: an SVG with the values and their moving average, on a log scale where they span decades.

    Where values were not finite the line has a gap and the bottom a mark.
    """
    finite = [(step, value) for step, value in points if value is not None]
    title = escape(name.replace("_", " "))
    if not finite:
        return f"<figure><figcaption><b>{title}</b> <span>never finite</span></figcaption></figure>"
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
        f'<text x="{LEFT - 6}" y="{axis.y(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        for tick in axis.ticks
    )
    steps = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{_short(tick)}</text>'
        for tick in _ticks(first, last, 4)
    )
    marks = "".join(f'<path class="lost" d="M{x(step):.1f} {HEIGHT - BOTTOM}v-8"/>' for step in lost[:CHART_POINTS])
    data = escape(json.dumps([[round(x(step), 1), step, _short(value)] for step, value in raw]))
    return (
        f"<figure><figcaption><b>{title}</b> <span>{_short(smooth[-1][1])}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by step" data-points="{data}">'
        f'<g class="grid">{grid}{steps}</g><path class="raw" d="{path(raw)}"/><path class="smooth" d="{path(smooth)}"/>'
        f'{marks}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """The value axis of a chart: linear, or logarithmic for positive values over decades."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float]) -> _Axis:
        """An axis that holds all values."""
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
    """About ``wanted`` round numbers from low to high."""
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = scale * min((1, 2, 5, 10), key=lambda factor: abs(factor * scale - rough))
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Moving average over a twentieth of the run."""
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


def _phases(run: Run) -> str:
    """Mean seconds of each phase of a step, as one stacked bar with its legend."""
    phases = {
        name.removeprefix(PHASE): statistics.fmean([value for _, value in points if value is not None] or [0.0])
        for name, points in run.curves.items()
        if name.startswith(PHASE)
    }
    if not phases:
        return ""
    whole = statistics.fmean([value for _, value in run.curves.get(SECONDS, []) if value] or [sum(phases.values())])
    phases |= {"other": rest} if (rest := whole - sum(phases.values())) > 0.005 * whole else {}
    total = sum(phases.values())
    bars, legend = [], []
    for number, (name, seconds) in enumerate(phases.items()):
        share = seconds / total
        bars.append(f'<i class="c{number % 8}" style="width:{100 * share:.2f}%"></i>')
        legend.append(
            f'<li><i class="c{number % 8}"></i>{escape(name)} <b>{_short(seconds)} s</b> <span>{share:.0%}</span></li>'
        )
    body = f'<div class="bar">{"".join(bars)}</div><ul class="legend">{"".join(legend)}</ul>'
    return _section("Seconds per step", body)


def _samples(run: Run) -> str:
    """A strip for each fixed prompt: its samples at several steps, as small looping pictures."""
    if not run.samples:
        return ""
    chosen = [run.samples[index] for index in evenly_spaced(len(run.samples), SHOWN_STEPS)]
    fps = run.config.get("video", {}).get("fps", 16)
    prompts = _prompts(run)
    rows = []
    for row in progress(range(min(SHOWN_PROMPTS, max(len(videos) for _, videos in chosen))), "samples", unit="prompt"):
        cells = [
            f'<li><img src="{_thumbnail(videos[row], fps)}" alt="prompt {row + 1}">step {step}</li>'
            for step, videos in chosen
            if row < len(videos)
        ]
        label = prompts[row] if row < len(prompts) else f"prompt {row + 1}"
        rows.append(f'<p>{escape(label)}</p><ul class="strip">{"".join(cells)}</ul>')
    return _section("Samples", f'<div class="samples">{"".join(rows)}</div>')


def _prompts(run: Run) -> list[str]:
    path = Path(run.config.get("data", {}).get("sample_prompts") or "")
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _thumbnail(video: Path, fps: float) -> str:
    """A video as a data URI of a small looping WebP; an empty one if it cannot be read."""
    from PIL import Image

    try:
        frames = read_video(video)
    except UserError:
        return "data:,"
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    for image in images:
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    options = {"duration": round(1000 / fps), "loop": 0, "quality": 75, "method": 2}
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    return _section(
        "Configuration", f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
    )


def _last(points: Sequence[Point] | None) -> float | None:
    return points[-1][1] if points else None


def _short(value: float) -> str:
    """A number in about three digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _duration(seconds: float) -> str:
    """Seconds as hours, minutes or seconds."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1a1d23;--soft:#667085;--line:#e3e6eb;--raw:#a9c3f5;
--smooth:#2459c9;--lost:#c4320a;--c0:#2459c9;--c1:#e07b00;--c2:#12805c;--c3:#a63d9b;--c4:#c4320a;--c5:#5f7186;
--c6:#0e8fb3;--c7:#8a6d1a}
@media (prefers-color-scheme:dark){:root{--page:#101216;--card:#191c22;--ink:#e8eaee;--soft:#98a1b0;--line:#2b303a;
--raw:#3a5285;--smooth:#8db4ff;--lost:#ff8a65;--c0:#6f9dff;--c1:#ffad4d;--c2:#4fc79a;--c3:#dc86d2;--c4:#ff8a65;
--c5:#93a3b8;--c6:#4cc3e6;--c7:#d6b656}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:24px 16px 0}main{padding:0 16px 48px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}header p{margin:2px 0 0;color:var(--soft)}
h2{font-size:17px;margin:28px 0 10px}ul{list-style:none;margin:0;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:10px;margin:18px 0 0}
.tiles div,figure,.samples,details,.legend{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles div,.legend,.samples,details{padding:10px 14px}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:20px;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:10px 12px 6px}figcaption{display:flex;justify-content:space-between;gap:8px}
figcaption span,.legend span{color:var(--soft);font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;touch-action:pan-y}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid line{stroke:var(--line)}.raw,.smooth{fill:none;stroke-linejoin:round}.raw{stroke:var(--raw);stroke-width:1}
.smooth{stroke:var(--smooth);stroke-width:2}.lost{stroke:var(--lost);stroke-width:1.5}
.cursor{stroke:var(--soft);opacity:0}
.bar{display:flex;height:26px;border-radius:8px;overflow:hidden;gap:2px;margin-bottom:10px}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:6px 18px}
.legend li{display:grid;grid-template-columns:14px 1fr auto 44px;gap:8px;align-items:center}
.legend li i{width:12px;height:12px;border-radius:3px}.legend span{text-align:right}
.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}.c3{background:var(--c3)}
.c4{background:var(--c4)}.c5{background:var(--c5)}.c6{background:var(--c6)}.c7{background:var(--c7)}
.samples p{margin:10px 0 4px}
.strip{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(104px,1fr);gap:8px;overflow-x:auto}
.strip li{color:var(--soft);font-size:13px;max-width:240px}
.strip img{display:block;width:100%;height:auto;border-radius:6px;border:1px solid var(--line)}
summary{cursor:pointer}pre{overflow-x:auto;font-size:13px;margin:8px 0 0}
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector("figcaption span"), settled = readout.textContent;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const [x, step, value] = points.reduce((a, b) => Math.abs(a[0] - at) < Math.abs(b[0] - at) ? a : b);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.opacity = 1;
    readout.textContent = `step ${step}: ${value}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.style.opacity = 0; readout.textContent = settled; });
}
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("logdir", help="the --logdir of a training, finished or not")
    args = parser.parse_args(arguments)
    return exit_code(lambda: print(f"wrote {write_report(args.logdir)}"))


if __name__ == "__main__":
    sys.exit(main())
