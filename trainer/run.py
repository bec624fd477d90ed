"""A run of train.py once its arguments are read: from the configuration to the last checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

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


def main(args: argparse.Namespace) -> None:
    """Train, or with ``--dry-run`` print what the run needs.

    Raises:
        UserError: the configuration, the weights, the data or the folder cannot be used.
    """
    config = load_config(Config, args.config_path, [*args.overrides, *flag_overrides(args)])
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


def flag_overrides(args: argparse.Namespace) -> list[str]:
    """Return the keys of the configuration that the flags of the command line set, each as ``key=value``."""
    overrides = ["trainer.wandb=false", "trainer.tensorboard=false"] if args.disable_wandb else []
    overrides += ["trainer.save_every=0"] if args.no_save else []
    return [*overrides, *(["trainer.sample_every=0"] if args.no_visualize else [])]
