"""Train: python train.py --config_path configs/shapes/self_forcing_dmd.yaml --logdir logs/try [trainer.steps=20 ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config_path", required=True, help="YAML file of values for trainer.config.Config")
    parser.add_argument(
        "--logdir", help="folder of the run; a run that has checkpoints in it continues from the last one"
    )
    parser.add_argument("--disable-wandb", action="store_true", help="report to metrics.jsonl only")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoint before the end, or before a signal")
    parser.add_argument("--no_visualize", action="store_true", help="make no samples before the end")
    parser.add_argument("--no_resume", action="store_true", help="start anew; earlier checkpoints are set aside")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run reproduces and needs, print all keys, and stop"
    )
    parser.add_argument("overrides", nargs="*", help="any key of the configuration, such as trainer.steps=20")
    args = parser.parse_intermixed_args(arguments)
    if args.logdir is None and not args.dry_run:
        parser.error("the following arguments are required: --logdir")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch ...", file=sys.stderr)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from trainer.about import describe
    from trainer.build import build_trainer
    from trainer.config import Config
    from trainer.resume import find_checkpoint
    from trainer.trainer import RunContext
    from utils.config import load_config, to_dict, to_yaml
    from utils.distributed import init_distributed, only_one, resolve_device
    from utils.files import ensure_writable_folder
    from utils.locks import folder_lock
    from utils.tracking import Tracker, setup_logging

    config = load_config(Config, args.config_path, args.overrides)
    if args.disable_wandb:
        config.trainer.wandb = config.trainer.tensorboard = False
    if args.no_save:
        config.trainer.save_every = 0
    if args.no_visualize:
        config.trainer.sample_every = 0
    if args.dry_run:
        print(*(f"# {line}" for line in describe(config, args.config_path)), to_yaml(config), sep="\n", end="")
        return
    device = resolve_device(config.device)
    logdir = ensure_writable_folder(Path(args.logdir))
    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    with only_one(folder_lock(logdir, "a training"), ranks):
        checkpoint, step = find_checkpoint(logdir, config.objective, ranks, anew=args.no_resume)
        loop = config.trainer
        options = {"wandb": loop.wandb, "tensorboard": loop.tensorboard, "is_main": ranks.is_main, "step": step}
        with Tracker(logdir, config=to_dict(config), **options) as tracker:
            build_trainer(config, RunContext(logdir, device, ranks, tracker, checkpoint)).train()


if __name__ == "__main__":
    sys.exit(main())
