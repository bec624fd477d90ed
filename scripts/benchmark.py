"""Measure speed: every stage of inference, training, loading, the codec, and bare matrix products to compare with.

    python scripts/benchmark.py inference --config_path configs/shapes/self_forcing_dmd.yaml
    python scripts/benchmark.py inference --config_path configs/self_forcing_dmd.yaml --random-weights
    python scripts/benchmark.py all --output benchmark.json

It prints a table with the command that reproduces it. --output saves it as JSON, --against compares with such a file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.measuring import MEASURES
from utils.checkout import find_shipped
from utils.cli import count, exit_code
from utils.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*MEASURES, "all"], help="what to measure; all takes about ten minutes")
    add(
        "--config_path",
        type=find_shipped,
        default="configs/shapes/self_forcing_dmd.yaml",
        help="YAML file; default: %(default)s",
    )
    add("--random-weights", action="store_true", help="use random weights, so that no files are needed; default: off")
    add("--frames", type=count, help="latent frames of a video; default: video.num_frames")
    add("--repeats", type=count, default=5, help="number of measured videos, passes or steps; default: %(default)s")
    add("--threads", type=count, help="CPU threads of torch; default: torch's choice")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu measures processor time, for a busy machine with --threads 1; default: %(default)s",
    )
    add("--output", help="JSON file for the results, written after each measurement; default: none")
    add("--against", help="JSON file of earlier results; print the ratios to them; default: none")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any key of the configuration, such as optimize.compile=default",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    args.command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if args.against and not Path(args.against).is_file():
        raise UserError(f"--against {args.against}: no such file; write one with --output")
    from scripts.runs.benchmark import run as measure

    measure(args)


if __name__ == "__main__":
    sys.exit(main())
