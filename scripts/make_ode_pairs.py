"""Sample a teacher, and store points of each denoising trajectory in the folder ode.pairs, for ODE regression.

With --causal the teacher is a causal model (trained with teacher forcing). It denoises each chunk after the clean
chunks of a real video, which are stored too. Run it again to continue after an interruption, or with a larger --count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.shard_arguments import parse, shard_parser
from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    config = "configs/shapes/ode_regression.yaml"
    parser = shard_parser(__doc__, config=config, items="trajectories", shard_size=32)
    add = parser.add_argument
    add("--causal", action="store_true", help="the teacher is causal and gets clean context; default: off")
    add("--count", type=int, default=512, metavar="N", help="number of trajectories; default: %(default)s")
    add("--batch", type=int, default=16, metavar="N", help="trajectories solved together; default: %(default)s")
    add(
        "--solver_steps",
        type=int,
        default=48,
        metavar="N",
        help="Euler steps; rollout.denoising_steps must be among their timesteps; default: %(default)s",
    )
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.make_ode_pairs import run as work

    work(args)


if __name__ == "__main__":
    sys.exit(main())
