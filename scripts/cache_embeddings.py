"""Encode every prompt that a training asks for into the folder data.embeddings. Training then needs no text encoder.

Run it again to continue after an interruption, or to add the prompts of another configuration to the same folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.shard_arguments import parse, shard_parser
from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    config = "configs/shapes/self_forcing_dmd.yaml"
    parser = shard_parser(__doc__, config=config, items="prompts", shard_size=1024)
    parser.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="FILE",
        help="another file of prompts to encode; may be repeated; default: none",
    )
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.cache_embeddings import run as work

    work(args)


if __name__ == "__main__":
    sys.exit(main())
