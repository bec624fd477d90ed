"""A run as one HTML page with nothing outside it: python -m trainer.report LOGDIR writes LOGDIR/report.html.

Curves, seconds per phase, samples over time and the configuration, of a finished run or of one that is still going;
whatever is missing is left out. LOGDIR/metrics.csv holds the curves' numbers.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trainer.charts import Point, chart, short_number
from trainer.report_style import SCRIPT, STYLE
from trainer.report_words import meaning
from utils.cli import exit_code
from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text
from utils.side_files import read_limited
from utils.spacing import evenly_spaced
from utils.tracking import METRICS_FILE, duration, progress, read_metrics
from utils.video.read import read_video

log = logging.getLogger(__name__)

SECONDS = "seconds"
PHASE = f"{SECONDS}_"
SHOWN_STEPS, SHOWN_PROMPTS = 8, 6
THUMBNAIL_PIXELS = 200


@dataclass
class Run:
    """The contents of a log folder."""

    name: str
    curves: dict[str, list[Point]]
    """Metric -> (step, value), in order. The value is None if it was not finite."""
    config: dict[str, Any]
    """The values of config.yaml; empty if there is none."""
    config_text: str
    samples: list[tuple[int, list[Path]]]
    """(step, videos), in order."""
    updated: float | None
    """The time of the last metrics, in seconds since 1970."""

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((points[-1][0] for points in self.curves.values()), default=0)


def read_run(logdir: str | Path) -> Run:
    """Read a log folder. If a step was done twice, after an interruption, its last line counts.

    Raises:
        UserError: there is no such folder.
    """
    logdir = Path(logdir)
    if not logdir.is_dir():
        raise UserError(f"{logdir}: no such log folder")
    metrics, config = logdir / METRICS_FILE, logdir / "config.yaml"
    text = read_limited(config).decode(errors="replace") if config.is_file() else ""
    videos = {int(folder.name[5:]): sorted(folder.glob("*.mp4")) for folder in logdir.glob("samples/step_[0-9]*")
              if folder.name[5:].isdecimal()}  # fmt: skip
    return Run(
        name=logdir.resolve().name,
        curves=to_curves(read_metrics(metrics, repair=False)),
        config=parse_config(text, config),
        config_text=text,
        samples=[(step, paths) for step, paths in sorted(videos.items()) if paths],
        updated=metrics.stat().st_mtime if metrics.is_file() else None,
    )


def parse_config(text: str, path: Path) -> dict[str, Any]:
    """Return the values of a config.yaml. If it is damaged, warn once and return nothing."""
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        values = str(error).partition("\n")[0]
    if isinstance(values, dict):
        return values
    log.warning("%s: is damaged (%s); the report leaves it out", path, values)
    return {}


def to_curves(lines: Sequence[Mapping[str, float | None]]) -> dict[str, list[Point]]:
    """Return the points of each metric. If a step was logged twice, its last line counts."""
    steps = {int(line["step"]): line for line in lines}
    curves: dict[str, list[Point]] = {}
    for step, line in sorted(steps.items()):
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append((step, value))
    return curves


def write_report(logdir: str | Path) -> Path:
    """Write report.html and metrics.csv into a log folder. Returns the path of the page."""
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
    """Return the HTML of the page."""
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
    """Return the figures of the run as a row of tiles."""
    seconds = [value for _, value in run.curves.get(SECONDS, []) if value]
    loop = run.config.get("trainer", {})
    total = loop.get("steps")
    tiles = [("step", f"{run.step}" + (f" of {total}" if total else ""))]
    if seconds:
        middle = statistics.median(seconds[-100:])
        tiles += [("steps per second", short_number(1 / middle)), ("computed", duration(sum(seconds)))]
        batch = loop.get("total_batch_size") or loop.get("batch_size")
        rate = _last(run.curves.get("samples_per_second")) or (batch / middle if batch else None)
        tiles += [("samples per second", short_number(rate))] if rate else []
        if total and run.step < total:
            tiles.append(("left", duration((total - run.step) * middle)))
    memory = [value for _, value in run.curves.get("memory_gib", []) if value]
    tiles += [("peak memory", f"{max(memory):.3g} GiB")] if memory else []
    lost = sum(value is None for points in run.curves.values() for _, value in points)
    tiles += [("values not finite", str(lost))] if lost else []
    if run.updated is not None:
        tiles.append(("last metrics", time.strftime("%Y-%m-%d %H:%M", time.localtime(run.updated))))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _curves(run: Run) -> str:
    names = sorted((name for name in run.curves if not name.startswith(PHASE)), key=_chart_order)
    if not names:
        return _section("Curves", "<p>No metrics yet.</p>")
    moving = [name for name in names if _constant(run.curves[name]) is None]
    charts = "".join(chart(name, run.curves[name], meaning(name)) for name in moving)
    return _section("Curves", f'<div class="charts">{charts}</div>{_level([n for n in names if n not in moving], run)}')


def _constant(points: Sequence[Point]) -> float | None:
    """Return the value of a curve of several points that never changed, else None."""
    values = {value for _, value in points}
    return values.pop() if len(values) == 1 and len(points) > 1 else None


def _level(names: Sequence[str], run: Run) -> str:
    """Return the curves that never changed, as a closed list."""
    if not names:
        return ""
    rows = "".join(
        f"<li><b>{escape(name.replace('_', ' '))}</b> {short_number(_constant(run.curves[name]))} "
        f"<span>{escape(meaning(name))}</span></li>"
        for name in names
    )
    title = "1 curve never changed" if len(names) == 1 else f"{len(names)} curves never changed"
    return f'<details class="level"><summary>{title}</summary><ul>{rows}</ul></details>'


def _chart_order(name: str) -> int:
    """Sort losses first, then other metrics of the objective, then the metrics of every run."""
    if "loss" in name:
        return 0
    return 2 if name.endswith("lr") or name == SECONDS or "memory" in name else 1


def _phases(run: Run) -> str:
    """Return the mean seconds of each phase of a step, as one stacked bar with its legend."""
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
            f'<li><i class="c{number % 8}"></i>{escape(name)} <b>{short_number(seconds)} s</b> '
            f"<span>{share:.0%}</span></li>"
        )
    body = f'<div class="bar">{"".join(bars)}</div><ul class="legend">{"".join(legend)}</ul>'
    return _section("Seconds per step", body)


def _samples(run: Run) -> str:
    """Return a strip for each fixed prompt: its samples at several steps, as small looping pictures."""
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
    """Return a video as a data URI of a small looping WebP. It is empty if the video cannot be read."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("logdir", help="the --logdir of a training that is finished or still running")
    args = parser.parse_args(arguments)
    return exit_code(lambda: print(f"wrote {write_report(args.logdir)}"))


if __name__ == "__main__":
    sys.exit(main())
