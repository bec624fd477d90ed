"""Count what full-size self-forcing training costs and write docs/training_cost.md; it needs no GPU and no weights.

FLOPs are closed formulas, which tests/test_count_cost.py holds against torch's counter over the project's own rollout,
losses and backward. Hours are FLOPs at a stated utilisation, no measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code
from utils.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("docs/training_cost.md"))
    add("--student", default="wan2.1-t2v-1.3b", metavar="PRESET", help="size of generator and critic")
    add(
        "--teachers",
        nargs="+",
        default=["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"],
        metavar="PRESET",
        help="sizes of the real score",
    )
    add("--frames", type=int, default=21, help="latent frames of a video")
    add("--height", type=int, default=480)
    add("--width", type=int, default=832)
    add("--batch", type=int, default=64, help="videos an update, over all GPUs")
    add("--iterations", type=int, default=600, help="of the official code: each trains the critic")
    add("--critic_updates", type=int, default=5, help="for each generator update")
    add("--gpus", type=int, nargs="+", default=[8, 64])
    add("--utilisation", type=float, nargs="+", default=[0.3, 0.4, 0.5], help="share of the peak that is reached")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args, sys.argv[1:] if arguments is None else arguments))


def run(args: argparse.Namespace, given: list[str]) -> None:
    if any(not 0 < share <= 1 for share in args.utilisation):
        raise UserError(f"--utilisation={args.utilisation} must lie in (0, 1]")
    if min(args.gpus) < 1 or any(args.batch % gpus for gpus in args.gpus):
        raise UserError(f"--batch={args.batch} does not divide over --gpus={args.gpus}")
    from scripts.runs.count_cost import run as count

    count(args, " ".join(["python scripts/count_cost.py", *given]))


if __name__ == "__main__":
    sys.exit(main())
