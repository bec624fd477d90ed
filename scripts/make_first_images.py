"""Draw the first images of prompts/i2v.jsonl and prompts/shapes_i2v.jsonl: python scripts/make_first_images.py"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_folder", default="prompts", help="folder for images and lists; default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.make_first_images import run as draw

    draw(Path(args.output_folder))


if __name__ == "__main__":
    sys.exit(main())
