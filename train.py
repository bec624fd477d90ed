"""Train: python train.py --config_path configs/shapes/self_forcing_dmd.yaml --logdir logs/try [trainer.steps=20 ...]"""

from __future__ import annotations

import argparse
import os
import sys

from utils.checkout import find_shipped
from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config_path", type=find_shipped, required=True, help="YAML file with the settings; required")
    parser.add_argument(
        "--logdir",
        help="folder of the run; if it has checkpoints, the last one is continued; required without --dry-run",
    )
    parser.add_argument(
        "--disable-wandb", action="store_true", help="write metrics to metrics.jsonl only; default: off"
    )
    parser.add_argument(
        "--no_save", action="store_true", help="write a checkpoint only at the end or after a signal; default: off"
    )
    parser.add_argument("--no_visualize", action="store_true", help="make samples only at the end; default: off")
    parser.add_argument(
        "--no_resume",
        action="store_true",
        help="start from the beginning; earlier files are kept under other names; default: off",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run reproduces and which files it needs, print all settings, and stop; default: off",
    )
    parser.add_argument("overrides", nargs="*", help="any key of the configuration, such as trainer.steps=20")
    args = parser.parse_intermixed_args(arguments)
    if not (args.logdir or "").strip() and not args.dry_run:
        parser.error("the following arguments are required: --logdir")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch ...", file=sys.stderr)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from trainer.run import main as train

    train(args)


if __name__ == "__main__":
    sys.exit(main())
