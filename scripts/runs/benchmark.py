"""Makes the measurements of benchmark.py and prints their tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch

from scripts.measuring import ALONE, MEASURES
from scripts.measuring.bench import Bench, Figures
from scripts.measuring.figures import is_known
from scripts.measuring.machine import machine
from trainer.config import Config
from utils.config import load_config
from utils.distributed import resolve_device
from utils.files import atomic_write_text


def run(args: argparse.Namespace) -> None:
    """Make the measurements that the arguments ask for, print their figures and save them."""
    bench = make_bench(args)
    against = json.loads(Path(args.against).read_text()) if args.against else None
    report = {"command": args.command, "machine": machine(bench.device), "results": {}}
    print_head(report, against)
    for name in [one for one in MEASURES if one not in ALONE] if args.what == "all" else [args.what]:
        figures = make_measurement(name, bench)
        report["results"][name] = figures
        print_figures(name, figures, against["results"].get(name, {}) if against else {})
        if args.output:
            atomic_write_text(args.output, json.dumps(report, indent=1) + "\n")


def make_bench(args: argparse.Namespace) -> Bench:
    """Return the bench that the command line describes."""
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


def make_measurement(name: str, bench: Bench) -> Figures:
    """Make one measurement and return its figures, named as in scripts/measuring/figures.py."""
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
