"""Writes a page from measured rows: tables, plots, contact sheets, and how they were made.

The page is reproduction.md, or ablations.md if a plan has no main rows. What a person has to say about a row, such as
why it contradicts the paper, belongs into notes.md in the folder of the page's name. The page takes it over.
"""

from __future__ import annotations

import csv
import io
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.reproduction.measuring import REAL, Measured, measured_file, read_measured, sheet_file
from scripts.reproduction.plan import FORMS, VARIED, MethodRow, ReproductionPlan
from scripts.reproduction.plot import line_plot
from scripts.reproduction.statistics import Interval, difference_interval, frechet_interval, mean_interval
from scripts.reproduction.training import commands
from utils.files import atomic_write_text

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = {  # column -> title, unit of its plot
    "present": ("present", "share"),
    "colour": ("colour", "share"),
    "shape": ("shape", "share"),
    "size": ("size", "share"),
    "background": ("background", "share"),
    "texture": ("texture kept", "share"),
    "direction": ("direction", "share"),
    "smooth": ("smooth", "share"),
    "speed": ("speed", "share"),
    "all_right": ("all right", "share"),
    "path_error": ("path error", "pixels"),
    "flicker": ("flicker", "8-bit levels"),
    "frechet": ("Fréchet distance", "squared latent units"),
}
SHOWN = ("shape", "texture", "speed", "smooth", "all_right", "path_error", "flicker", "frechet")
PLOTTED = ("all_right", "speed", "shape", "path_error", "frechet")
NOTES = "notes.md"
CLAIM_LENGTH = 4  # multiples of the training length at which the methods are compared
LOWER_IS_BETTER = {"path_error", "flicker", "frechet"}
JUDGED = ("speed", "all_right", "path_error", "frechet")
RULE = (
    "One row is ahead of another if the 95 % interval of their difference, prompt by prompt and seed by seed, does not "
    "contain zero. For the Fréchet distance the two intervals must not overlap."
)


@dataclass(frozen=True)
class MeasuredRow:
    """A row with its results."""

    row: MethodRow
    trainings: int
    steps: str
    frames_per_second: float | None
    values: dict[int, dict[str, Interval]]
    """Length -> column -> value."""
    samples: dict[int, dict[str, list[list[float]]]]
    """Length -> column -> one value for each training and prompt [T P]. The Fréchet distance has none."""


def write_reproduction(plan: ReproductionPlan, folder: Path, target: Path, command: str) -> Path:
    """Write the page, and the folder of its name with its table, plots and sheets, into ``target``."""
    entries, real = _entries(plan, folder)
    page = target / ("reproduction.md" if plan.budget.main else "ablations.md")
    assets = page.with_suffix("")
    assets.mkdir(parents=True, exist_ok=True)
    atomic_write_text(assets / "table.csv", _csv(entries, real))
    for form in plan.budget.forms:
        for column in PLOTTED:
            if lines := _lines(entries, form, column):
                title, unit = COLUMNS[column]
                plot = line_plot(f"{form}: {title} against length", unit, lines)
                atomic_write_text(assets / f"{form}-{column}.svg", plot)
    for name in [REAL, *(entry.row.name for entry in entries if entry.row.main)]:
        if (sheet := sheet_file(folder, name, plan.budget.seeds[0])).is_file():
            with Image.open(sheet) as image:  # in 256 colours it is less than half as large
                image.convert("RGB").quantize(256).save(assets / f"{name}.png", optimize=True)
    notes = assets / NOTES
    text = notes.read_text(encoding="utf-8").strip() if notes.is_file() else ""
    atomic_write_text(page, _page(plan, entries, real, command=command, notes=text))
    return page


def _entries(plan: ReproductionPlan, folder: Path) -> tuple[list[MeasuredRow], MeasuredRow | None]:
    """Return the measured rows, and that of real clips."""
    real_file = measured_file(folder, REAL, 0)
    real = read_measured(real_file) if real_file.is_file() else None
    entries = []
    for row in plan.rows:
        files = [measured_file(folder, row.name, seed) for seed in plan.budget.seeds[: len(row.trainings)]]
        measured = [read_measured(file) for file in files if file.is_file()]
        if measured:
            entries.append(_entry(row, measured, real))
    return entries, real and _entry(MethodRow("Real clips after the codec", "", ()), [real], None)


def _entry(row: MethodRow, measured: Sequence[Measured], real: Measured | None) -> MeasuredRow:
    values: dict[int, dict[str, Interval]] = {}
    samples: dict[int, dict[str, list[list[float]]]] = {}
    for length, columns in measured[0].columns.items():
        taken = {name: [part.columns[length][name] for part in measured] for name in columns}
        found = {name: mean_interval(table) for name, table in taken.items()}
        if real is not None and length in real.features:
            found["frechet"] = frechet_interval(real.features[length], [part.features[length] for part in measured])
        times = int(length.removesuffix("x"))
        values[times], samples[times] = found, taken
    speeds = [part.frames_per_second for part in measured if part.frames_per_second is not None]
    return MeasuredRow(row, len(measured), _steps(row), max(speeds) if speeds else None, values, samples)


def _steps(row: MethodRow) -> str:
    """Return how many passes of the denoiser make a chunk, in words."""
    if not row.trainings:
        return "-"
    if any(override.startswith("sampler=") for override in row.overrides):
        return "16, with guidance"
    listed = [override for override in row.overrides if override.startswith("rollout.denoising_steps=")]
    return str(listed[0].count(",") + 1) if listed else "4"


def _lines(entries: Sequence[MeasuredRow], form: str, column: str) -> dict[str, dict[int, Interval]]:
    return {
        entry.row.method: {length: values[column] for length, values in entry.values.items() if column in values}
        for entry in entries
        if entry.row.form == form and entry.row.main
    }


def _csv(entries: Sequence[MeasuredRow], real: MeasuredRow | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    facts = ["form", "method", "length", "trainings", "steps", "frames_per_second"]
    writer.writerow([*facts, "column", "mean", "low", "high"])
    for entry in [*([real] if real else []), *entries]:
        speed = "" if entry.frames_per_second is None else round(entry.frames_per_second, 1)
        for length, columns in entry.values.items():
            for name, value in columns.items():
                facts = [entry.row.form, entry.row.method, length, entry.trainings, entry.steps, speed]
                writer.writerow([*facts, name, *(round(number, 4) for number in value)])
    return text.getvalue()


def _page(
    plan: ReproductionPlan, entries: Sequence[MeasuredRow], real: MeasuredRow | None, *, command: str, notes: str
) -> str:
    budget = plan.budget
    parts = [
        "# The claim, reproduced in the Shapes world"
        if budget.main
        else "# Ablations of Self Forcing in the Shapes world",
        f"`{command}` wrote this page from its own runs, at revision `{_revision()}`. Do not edit it: run the script.",
        f"Budget `{budget.name}`: students take {budget.start_steps} updates of 16 clips from the teacher's weights, "
        f"by teacher forcing (TF) or diffusion forcing (DF). Every method then takes {budget.steps} updates of 8 "
        f"clips. Seeds: the column counts the trainings of a row, of {len(budget.seeds)} planned for a main row. "
        f"Held-out prompts: {budget.prompts}. Videos of each prompt: "
        f"{len(budget.video_seeds)}. A value is a mean with the larger half of its 95 % interval, over prompts and "
        "seeds (bootstrap).",
        "Lengths are multiples of the training length; a value at 4x covers the whole video up to 4x. Shares, such as "
        "`speed` (within 20 % of the world's speed) and `all right`, are better if higher. Path error (pixels from "
        "exact physics), flicker (8-bit levels) and the Fréchet distance (codec features of the last training length, "
        "against real clips) are better if lower.",
    ]
    for form in budget.forms:
        own = [entry for entry in entries if entry.row.form == form]
        parts += [f"## {form.capitalize()}: {FORMS[form]} latent frame(s) at a time", *_verdict(own), *_ablated(own)]
        parts += [*_tables(own, real), *_pictures(form, own)]
    if notes:
        parts += ["## Notes", notes]
    return "\n\n".join([*parts, "## Commands", _commands(plan)]) + "\n"


def _commands(plan: ReproductionPlan) -> str:
    """Return the commands of the trainings with the first seed, as the script ran them."""
    folder, first = Path("logs") / "reproduction" / plan.budget.name, plan.budget.seeds[0]
    shown = [commands(training, folder) for training in plan.trainings if training.seed == first]
    lines = [" ".join(["python", *command]) for made in shown for command in made]
    return "\n".join(["```bash", *lines, "```"])


def _tables(entries: Sequence[MeasuredRow], real: MeasuredRow | None) -> list[str]:
    """Return a table for each length."""
    lengths = sorted({length for entry in entries for length in entry.values})
    shown = [*([real] if real else []), *entries]
    return [part for length in lengths for part in (f"### {length}x", _table(shown, length))]


def _pictures(form: str, entries: Sequence[MeasuredRow]) -> list[str]:
    """Return the plots and contact sheets of the main rows of one form."""
    rows = [entry.row for entry in entries if entry.row.main]
    if not rows:
        return []
    plots = [f"![{COLUMNS[name][0]}](reproduction/{form}-{name}.svg)" for name in PLOTTED]
    sheets = [f"{row.method}:\n\n![{row.method}](reproduction/{row.name}.png)" for row in rows]
    return ["### Quality against length", *plots, "### Contact sheets", *sheets]


def _table(entries: Sequence[MeasuredRow], length: int) -> str:
    shown = [entry for entry in entries if length in entry.values]
    names = [name for name in SHOWN if any(name in entry.values[length] for entry in shown)]
    titles = ["method", *(COLUMNS[name][0] for name in names), "seeds", "steps", "frames/s"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for entry in shown:
        cells = [str(entry.values[length].get(name, "-")) for name in names]
        speed = "-" if entry.frames_per_second is None else f"{entry.frames_per_second:.0f}"
        seeds = str(entry.trainings) if entry.row.trainings else "-"
        lines.append(f"| {' | '.join([entry.row.method, *cells, seeds, entry.steps, speed])} |")
    return "\n".join(lines)


def _verdict(entries: Sequence[MeasuredRow]) -> list[str]:
    """Return whether each self-forcing DMD of the main rows is ahead of the others, by more than the intervals."""
    said = []
    for column in JUDGED:
        found = [entry for entry in entries if entry.row.main and column in entry.values.get(CLAIM_LENGTH, {})]
        others = [entry for entry in found if not entry.row.method.startswith("Self Forcing")]
        for ours in [entry for entry in found if entry.row.method.startswith("Self Forcing DMD")] if others else []:
            verdicts: dict[str, list[str]] = {}
            for other in others:
                verdicts.setdefault(_compare(ours, other, column), []).append(_shown(other, column))
            compared = "; ".join(f"{verdict} {', '.join(which)}" for verdict, which in verdicts.items())
            said.append(f"- {COLUMNS[column][0]} at {CLAIM_LENGTH}x: {_shown(ours, column)} is {compared}.")
    return ["\n".join(said), RULE] if said else []


def _ablated(entries: Sequence[MeasuredRow]) -> list[str]:
    """Return which ablations are ahead of the method that they vary, or behind it, by more than the interval."""
    said = []
    for column in JUDGED:
        found = [entry for entry in entries if column in entry.values.get(CLAIM_LENGTH, {})]
        base = [entry for entry in found if entry.row.method == VARIED]
        varied = [entry for entry in found if not entry.row.main and entry.row.method != VARIED]
        if base and varied:
            verdicts: dict[str, list[str]] = {"ahead of": [], "behind": [], "not apart from": []}
            for entry in varied:
                verdicts[_compare(entry, base[0], column)].append(_shown(entry, column))
            listed = [f"{verdict} it: {', '.join(verdicts[verdict]) or 'none'}" for verdict in ("ahead of", "behind")]
            title, reference = COLUMNS[column][0], _shown(base[0], column)
            said.append(f"- {title} at {CLAIM_LENGTH}x, against {reference}: {'; '.join(listed)}.")
    return ["\n".join(said), RULE] if said else []


def _shown(entry: MeasuredRow, column: str) -> str:
    return f"{entry.row.method} ({entry.values[CLAIM_LENGTH][column]})"


def _compare(ours: MeasuredRow, other: MeasuredRow, column: str) -> str:
    if column in ours.samples[CLAIM_LENGTH]:
        tables = ours.samples[CLAIM_LENGTH][column], other.samples[CLAIM_LENGTH][column]
        difference = difference_interval(*tables)
        apart, higher = difference.low > 0 or difference.high < 0, difference.mean > 0
    else:
        value, reference = ours.values[CLAIM_LENGTH][column], other.values[CLAIM_LENGTH][column]
        apart, higher = value.low > reference.high or value.high < reference.low, value.mean > reference.mean
    if not apart:
        return "not apart from"
    return "ahead of" if higher != (column in LOWER_IS_BETTER) else "behind"


def _revision() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
