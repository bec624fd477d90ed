"""The arguments that all scripts share which fill a folder of shards."""

from __future__ import annotations

import argparse


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
