"""Reproduce the paper's claim in the Shapes world: train every method from one teacher, measure it, write a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import count, exit_code

EPILOG = """\
It trains, then measures, then writes REPORT/reproduction.md with a table, plots and a contact sheet for each method,
or REPORT/ablations.md.
Stop it at any time and run the same command again: finished trainings and measured rows are kept, and a training that
was stopped goes on from its last checkpoint. It needs the teacher, codec and text encoder of checkpoints/shapes.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="frame-wise, one seed, fewer updates: about 40 CPU minutes; default: off")
    add("--folder", metavar="FOLDER", help="trainings and measurements; default: logs/reproduction/BUDGET")
    add("--report", metavar="FOLDER", help="folder for reproduction.md or ablations.md; default: FOLDER/report")
    add(
        "--form",
        choices=("framewise", "chunkwise", "both"),
        help="chunks of one latent frame, of three, or both; default: framewise with --quick, else both",
    )
    add(
        "--seeds",
        type=count,
        metavar="N",
        help="trainings of each method, with the seeds 0 to N - 1; default: 1 with --quick, else 3",
    )
    add(
        "--prompts",
        type=count,
        metavar="N",
        help="held-out prompts that are measured; default: 24 with --quick, else 96",
    )
    add(
        "--rows",
        choices=("main", "ablations", "all"),
        help="main: the methods; ablations: self-forcing DMD from other starts and with other settings, in a report of "
        "its own; all: both in one; default: main with --quick, else all",
    )
    add(
        "--plan",
        action="store_true",
        help="print the plan and its estimated time on this machine, and stop; default: off",
    )
    add(
        "overrides", nargs="*", metavar="key=value", help="keys of the configuration for all trainings and measurements"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.reproduce import run as work

    work(args)


if __name__ == "__main__":
    sys.exit(main())
