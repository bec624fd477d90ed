"""The folder, the device and the processes of a script that fills a folder of shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.config import Config
from utils.config import load_config
from utils.distributed import Ranks, init_distributed, resolve_device, resolve_dtype
from utils.errors import UserError
from utils.tracking import setup_logging


@dataclass(frozen=True)
class ShardJob:
    """One run of such a script."""

    config: Config
    folder: str
    """The folder to fill."""
    device: torch.device
    dtype: torch.dtype
    """The dtype in which the models compute."""
    ranks: Ranks


def begin(args: argparse.Namespace, key: str, *, check: Callable[[Config], None] = lambda config: None) -> ShardJob:
    """Read the configuration, check it, and only then join the other processes and choose the device.

    Args:
        args: the arguments, as :func:`scripts.shard_arguments.shard_parser` reads them.
        key: the setting that names the folder, such as "data.path".
        check: raises UserError if the configuration or the arguments do not fit.

    Raises:
        UserError: no folder is named, or the configuration cannot be read.
    """
    config = load_config(Config, args.config_path, args.overrides)
    section, name = key.split(".")
    folder = getattr(getattr(config, section), name)
    if folder is None:
        raise UserError(f"{key} is null; name the folder to fill: {key}=FOLDER")
    if args.shard_size < 1:
        raise UserError(f"--shard_size={args.shard_size} must be at least 1")
    check(config)
    device = resolve_device(config.device)
    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    return ShardJob(config, folder, device, resolve_dtype(config.dtype, device), ranks)
