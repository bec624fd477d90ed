"""Serve the demo on several GPUs or machines. Each replica has one model. Ray Serve starts and replaces replicas."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from utils.cli import exit_code

if TYPE_CHECKING:
    from ray.serve import Application


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    demo.add_server_arguments(parser)
    parser.set_defaults(share=False, download=False)
    add = parser.add_argument_group("the fleet").add_argument
    add("--replicas", type=int, default=1, help="number of replicas that always run; default: %(default)s")
    add(
        "--max-replicas",
        type=int,
        default=0,
        metavar="N",
        help="most replicas that may run when many viewers wait; default: --replicas",
    )
    add("--gpus", type=float, default=1.0, help="GPUs of each replica, 0 for the CPU; default: %(default)s")
    add("--cpus", type=float, default=1.0, help="CPU cores reserved for each replica; default: %(default)s")
    add("--hang-seconds", type=float, default=300.0, metavar="S",
        help="seconds; a replica that works on one chunk for longer is replaced; default: %(default)s")  # fmt: skip
    add("--address", help="a running Ray cluster, such as auto; default: a new one on this machine")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_intermixed_args(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.serve_fleet import run as serve

    serve(args)


def build(values: dict[str, Any]) -> Application:
    """Return the application for ``serve deploy`` and KubeRay: ``import_path: scripts.serve_fleet:build``.

    Args:
        values: ``{"arguments": "--replicas 2 ..."}``, a command line of this program.

    Raises:
        UserError: an argument cannot be used.
    """
    args = make_parser().parse_intermixed_args(shlex.split(values.get("arguments", "")))
    from scripts.runs.serve_fleet import make_application

    return make_application(args)


if __name__ == "__main__":
    sys.exit(main())
