"""Measure speed: every stage of inference, training, loading, the codec, and the floor of bare matrix products.

    python scripts/benchmark.py inference --config_path configs/shapes/self_forcing_dmd.yaml
    python scripts/benchmark.py inference --config_path configs/self_forcing_dmd.yaml --random-weights
    python scripts/benchmark.py all --output benchmark.json

Prints a table with the command that reproduces it; --output keeps it as JSON, --against compares with such a file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

if TYPE_CHECKING:
    from scripts.measuring.bench import Bench, Figures

MEASURES = {
    "inference": "inference",
    "session": "sessions",
    "viewers": "sessions",
    "endless": "inference",
    "floor": "floors",
    "peer": "floors",
    "codec": "codecs",
    "codec_peer": "codecs",
    "load": "programs",
    "train": "programs",
}
"""Measurement -> module of scripts.measuring whose function ``measure_NAME`` makes it."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*MEASURES, "all"], help="what to measure; all takes about ten minutes")
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="configuration; default: %(default)s")
    add("--random-weights", action="store_true", help="full-size parts without files, and random text embeddings")
    add("--frames", type=int, help="latent frames a video; default: the configuration's")
    add("--repeats", type=int, default=5, help="videos, passes or steps measured; default: %(default)s")
    add("--threads", type=int, help="CPU threads of torch; default: torch's choice")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor time, for a busy machine and --threads 1; default: %(default)s",
    )
    add("--output", help="write the results to this JSON file, after each measurement")
    add("--against", help="print ratios to the results in this JSON file")
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
    from scripts.measuring.machine import machine
    from utils.errors import UserError
    from utils.files import atomic_write_text

    if args.against and not Path(args.against).is_file():
        raise UserError(f"--against {args.against}: no such file; write one with --output")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    bench = make_bench(args)
    against = json.loads(Path(args.against).read_text()) if args.against else None
    report = {"command": args.command, "machine": machine(bench.device), "results": {}}
    print_head(report, against)
    for name in MEASURES if args.what == "all" else [args.what]:
        figures = measure(name, bench)
        report["results"][name] = figures
        print_figures(name, figures, against["results"].get(name, {}) if against else {})
        if args.output:
            atomic_write_text(args.output, json.dumps(report, indent=1) + "\n")


def make_bench(args: argparse.Namespace) -> Bench:
    """Make the bench that the command line describes."""
    import torch

    from scripts.measuring.bench import Bench
    from trainer.config import Config
    from utils.config import load_config
    from utils.distributed import resolve_device

    config = load_config(Config, args.config_path, args.overrides)
    if args.threads:
        torch.set_num_threads(args.threads)
    return Bench(
        config,
        resolve_device(config.device),
        config_path=args.config_path,
        overrides=tuple(args.overrides),
        repeats=args.repeats,
        frames=args.frames,
        random_weights=args.random_weights,
        cpu_clock=args.clock == "cpu",
        threads=args.threads,
    )


def measure(name: str, bench: Bench) -> Figures:
    """Make one of the measurements. Every figure has a name of scripts/measuring/figures.py."""
    from importlib import import_module

    from scripts.measuring.figures import is_known

    module = import_module(f"scripts.measuring.{MEASURES[name]}")
    figures = getattr(module, f"measure_{name}")(bench)
    unknown = [figure for figure in figures if not is_known(name, figure)]
    assert not unknown, f"{name}: {unknown} are not in scripts/measuring/figures.py"
    return figures


def print_head(report: dict, against: dict | None) -> None:
    """Print the conditions on which the figures depend."""
    print(f"$ {report['command']}")
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    if against:
        print(f"ratios to: {against['command']} ({against['machine']['device']}, torch {against['machine']['torch']})")


def print_figures(name: str, figures: Figures, earlier: Figures, goals: Mapping[str, object] | None = None) -> None:
    """Print the figures of one measurement, each with its ratio to an earlier one and its goal, if it has one."""
    print(f"\n{name}")
    for figure, value in figures.items():
        ratio = f"  {value / earlier[figure]:8.3f} x" if earlier.get(figure) else ""
        goal = f"  goal: {goals[figure]}" if goals and figure in goals else ""
        print(f"  {figure:32} {value:12.4g}{ratio}{goal}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
