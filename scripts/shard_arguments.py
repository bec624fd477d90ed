"""The arguments that all scripts have in common that fill a folder of shards."""

from __future__ import annotations

import argparse

from utils.checkout import find_shipped


def shard_parser(description: str, *, config: str, items: str, shard_size: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all these scripts have.

    Args:
        description: the help text.
        config: the default configuration file.
        items: the content of a shard, in the plural.
        shard_size: the default number of items in a shard.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config_path", type=find_shipped, default=config, metavar="YAML", help="YAML file; default: %(default)s"
    )
    parser.add_argument(
        "--shard_size",
        type=int,
        default=shard_size,
        metavar="N",
        help=f"{items} in one file; an interruption loses at most this many; default: %(default)s",
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. The remaining arguments are settings."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the YAML")
    return parser.parse_intermixed_args(arguments)
