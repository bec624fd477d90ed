"""Describes this machine and tests every code path on it."""

from __future__ import annotations

import argparse
import json

from pipeline.config import load_pipeline_config
from scripts.checks import facts, selftest
from scripts.checks.speed import measure_row, rows
from scripts.measuring.figures import goals_of
from scripts.runs.benchmark import print_figures
from utils.distributed import resolve_device, resolve_dtype
from utils.files import atomic_write_text


def run(args: argparse.Namespace) -> list[str]:
    """Print all results and return the lines of the failures."""
    device = resolve_device(args.device)
    config = load_pipeline_config(args.config_path)
    dtype = resolve_dtype("auto", device)
    report: dict = {
        "machine": facts.hardware(device),
        "packages": facts.packages(),
        "attention kernels": facts.kernels(device, dtype),
        "memory": {args.config_path: facts.memory_profile(config, device, dtype)},
    }
    for title, lines in report.items():
        print_lines(title, lines)
    report["checks"], failed = run_checks(device)
    if args.benchmark:
        report["benchmark"] = run_benchmark(device)
    if args.json:
        atomic_write_text(args.json, json.dumps(report, indent=1) + "\n")
    return failed


def print_lines(title: str, lines: dict[str, str]) -> None:
    """Print facts under a title."""
    print(f"\n{title}")
    for name, value in lines.items():
        print(f"  {name:16}  {value}", flush=True)


def run_checks(device) -> tuple[list[dict], list[str]]:
    """Run all checks. Return the result of each check and the lines of the failures."""
    print("\nself-test", flush=True)
    outcomes = []
    for check in selftest.all_checks(device):
        outcomes.append(selftest.perform(check))
        print(f"  {outcomes[-1]}", flush=True)
    failed = [f"{one.name}: {one.detail}" for one in outcomes if one.state == "failed"]
    seconds = sum(one.seconds for one in outcomes)
    tried = sum(one.state != "skipped" for one in outcomes)
    print(f"  {tried - len(failed)} of {tried} passed in {seconds:.0f} s, {len(outcomes) - tried} skipped")
    return [one.as_dict() for one in outcomes], failed


def run_benchmark(device) -> dict[str, dict[str, float]]:
    """Measure speed and return the figures of each row."""
    results = {}
    for row in rows(device):
        results[row.title] = measure_row(row, device)
        print_figures(f"{row.title} (benchmark.py {row.name})", results[row.title], {}, goals_of(row.title))
    return results
