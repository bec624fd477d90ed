"""The common part of scripts that fill a folder of shards: their arguments, the device and the processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainer.config import Config
    from utils.distributed import Ranks


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


def shard_parser(description: str, *, config: str, items: str, shard_size: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all such scripts.

    Args:
        description: the help text.
        config: the default configuration file.
        items: what a shard holds, in the plural.
        shard_size: the default number of items in a shard.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config_path", default=config, metavar="YAML", help="default: %(default)s")
    parser.add_argument(
        "--shard_size",
        type=int,
        default=shard_size,
        metavar="N",
        help=f"{items} in a file; an interruption loses at most as many (default: %(default)s)",
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. The remaining arguments are settings."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the YAML")
    return parser.parse_intermixed_args(arguments)


def begin(args: argparse.Namespace, key: str, *, check: Callable[[Config], None] = lambda config: None) -> ShardJob:
    """Read the configuration, check it, and only then join the other processes and choose the device.

    Args:
        args: the arguments, from a :func:`shard_parser`.
        key: the setting that names the folder, such as "data.path".
        check: raises UserError if the configuration or the arguments do not fit.

    Raises:
        UserError: no folder is named, or the configuration cannot be read.
    """
    from trainer.config import Config
    from utils.config import load_config
    from utils.distributed import init_distributed, resolve_device, resolve_dtype
    from utils.errors import UserError
    from utils.tracking import setup_logging

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
