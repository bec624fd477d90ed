"""Run the long tests: killed trainings, damaged checkpoints, and a demo that is attacked.

python scripts/endure.py [PART ...]

Without PART all parts run one after the other, in less than 15 minutes on two CPU cores. They print one table. The exit
code is 1 if a figure exceeds its limit.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.endurance.figures import Figure
from utils.cli import exit_code

if TYPE_CHECKING:
    from scripts.endurance.figures import Figure

PARTS = {
    "kills": "kill trainings 50 times, with one and two processes; the result must be equal to the last bit",
    "damage": "flip every bit and damage every file of a checkpoint; a run must go on from the newest good one",
    "serving": "visit the demo 500 times and attack it; it must stay small, quick and fair",
}
"""Name of a module in scripts/endurance -> what it does. The module has ``run(folder: Path) -> list[Figure]``."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    listing = "\n".join(f"  {name:10}{text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="the parts to run; default: all")
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is not a part; choose from {', '.join(PARTS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    broken: list[Figure] = []
    return exit_code(lambda: broken.extend(run(args.parts or list(PARTS)))) or bool(broken)


def run(parts: list[str]) -> list[Figure]:
    """Run parts and print the table. Return the figures that exceed their limit."""
    started, figures = time.monotonic(), []
    print("| part | what | value | limit | |\n|---|---|---|---|---|", flush=True)
    for part in parts:
        print(f"{part}: {PARTS[part]} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"endure-{part}-") as folder:
            found = importlib.import_module(f"scripts.endurance.{part}").run(Path(folder))
        minutes = (time.monotonic() - begun) / 60
        found.append(Figure("minutes", round(minutes, 1), "all parts together at most 15", minutes <= 15))
        for each in found:
            print(f"| {part} | {each.what} | {each.value:g} | {each.limit} | {'ok' if each.is_kept else 'BROKEN'} |")
        sys.stdout.flush()
        figures += found
    print(f"{(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)
    return [figure for figure in figures if not figure.is_kept]


if __name__ == "__main__":
    sys.exit(main())
