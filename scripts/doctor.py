"""Look at this machine, and try every path that a video or a training step takes on it.

    python scripts/doctor.py                  # about a minute; paste its output into a bug report
    python scripts/doctor.py --benchmark      # also measures speed: at most six minutes, needs no download
    python scripts/doctor.py --json doctor.json

Exit code 1 means that something failed; the last line says what.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config_path", default="configs/self_forcing_dmd.yaml", help="memory is planned for it; default: %(default)s")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu; default: %(default)s")
    add("--benchmark", action="store_true", help="measure speed too, with random weights: at most six minutes")
    add("--json", metavar="FILE", help="write everything to this file too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    failed: list[str] = []
    code = exit_code(lambda: failed.extend(run(args)))
    if failed:
        print(f"FAILED: {failed[0]}" + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""))
    return code or int(bool(failed))


def run(args: argparse.Namespace) -> list[str]:
    """Print all results and return the lines of the failures."""
    from pipeline.config import load_pipeline_config
    from scripts.checks import facts
    from utils.distributed import resolve_device, resolve_dtype
    from utils.files import atomic_write_text

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
    """Run all checks. Returns the result of each, and the lines of the failures."""
    from scripts.checks.selftest import all_checks, perform

    print("\nself-test", flush=True)
    outcomes = []
    for check in all_checks(device):
        outcomes.append(perform(check))
        print(f"  {outcomes[-1]}", flush=True)
    failed = [f"{one.name}: {one.detail}" for one in outcomes if one.state == "failed"]
    seconds = sum(one.seconds for one in outcomes)
    tried = sum(one.state != "skipped" for one in outcomes)
    print(f"  {tried - len(failed)} of {tried} passed in {seconds:.0f} s, {len(outcomes) - tried} skipped")
    return [one.as_dict() for one in outcomes], failed


def run_benchmark(device) -> dict[str, dict[str, float]]:
    """Measure speed and return the figures of each row."""
    from scripts.benchmark import print_figures
    from scripts.checks.speed import measure_row, rows
    from scripts.measuring.figures import goals_of

    results = {}
    for row in rows(device):
        results[row.title] = measure_row(row, device)
        print_figures(f"{row.title} (benchmark.py {row.name})", results[row.title], {}, goals_of(row.title))
    return results


if __name__ == "__main__":
    sys.exit(main())
