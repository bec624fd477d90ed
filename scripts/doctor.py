"""Describe this machine, and test every code path that a video or a training step takes on it.

    python scripts/doctor.py                  # about a minute; paste its output into a bug report
    python scripts/doctor.py --benchmark      # also measures speed: at most six minutes, needs no download
    python scripts/doctor.py --json doctor.json

Exit code 1 means that a test failed. The last line says which.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.checkout import find_shipped
from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--config_path",
        type=find_shipped,
        default="configs/self_forcing_dmd.yaml",
        help="YAML file for the memory plan; default: %(default)s",
    )
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu; default: %(default)s")
    add("--benchmark", action="store_true", help="also measure speed with random weights, in at most six minutes; "
        "default: off")  # fmt: skip
    add("--json", metavar="FILE", help="also write all results to this JSON file; default: none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    failed: list[str] = []
    code = exit_code(lambda: failed.extend(run(args)))
    if failed:
        print(f"FAILED: {failed[0]}" + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""))
    return code or int(bool(failed))


def run(args: argparse.Namespace) -> list[str]:
    from scripts.runs.doctor import run as examine

    return examine(args)


if __name__ == "__main__":
    sys.exit(main())
