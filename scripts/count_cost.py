"""Count the cost of full-size Self Forcing training, and write it to docs/training_cost.md. No GPU or weights needed.

FLOPs come from closed formulas. tests/test_count_cost.py compares these with torch's FLOP counter over this project's
own rollout, losses and backward pass. Hours are computed from FLOPs and an assumed utilisation. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import count, exit_code
from utils.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("docs/training_cost.md"), help="page to write; default: %(default)s")
    add("--student", default="wan2.1-t2v-1.3b", metavar="PRESET",
        help="size of the generator and the critic; default: %(default)s")  # fmt: skip
    add(
        "--teachers",
        nargs="+",
        default=["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"],
        metavar="PRESET",
        help="sizes of the teacher (real score); default: %(default)s",
    )
    add("--frames", type=count, default=21, help="latent frames of a video; default: %(default)s")
    add("--height", type=count, default=480, help="pixels; default: %(default)s")
    add("--width", type=count, default=832, help="pixels; default: %(default)s")
    add("--batch", type=count, default=64, help="videos of one update on all GPUs together; default: %(default)s")
    add("--iterations", type=count, default=600,
        help="iterations as the official code counts them: each trains the critic; default: %(default)s")  # fmt: skip
    add(
        "--critic_updates", type=count, default=5, help="critic updates for each generator update; default: %(default)s"
    )
    add("--gpus", type=count, nargs="+", default=[8, 64], help="numbers of GPUs; default: %(default)s")
    add("--utilisation", type=float, nargs="+", default=[0.3, 0.4, 0.5],
        help="assumed shares of the GPU's peak speed, above 0, at most 1; default: %(default)s")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args, sys.argv[1:] if arguments is None else arguments))


def run(args: argparse.Namespace, given: list[str]) -> None:
    if any(not 0 < share <= 1 for share in args.utilisation):
        raise UserError(f"--utilisation={args.utilisation} must lie in (0, 1]")
    if min(args.gpus) < 1 or any(args.batch % gpus for gpus in args.gpus):
        raise UserError(f"--batch={args.batch} is not a multiple of each of --gpus={args.gpus}")
    from scripts.runs.count_cost import run as count

    count(args, " ".join(["python scripts/count_cost.py", *given]))


if __name__ == "__main__":
    sys.exit(main())
