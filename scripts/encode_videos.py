"""Encode a folder of videos to latents once, and store them in the folder data.path for data.kind=videos.

Every video needs its prompt in a text file of the same name beside it (cat.mp4, cat.txt), or in --prompts. The first
video.num_frames latent frames are kept, at video.fps, scaled and cropped to video.height x video.width.
Run it again to continue after an interruption, or when you have added videos.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.shard_arguments import parse, shard_parser
from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    config = "configs/shapes/diffusion_forcing.yaml"
    parser = shard_parser(__doc__, config=config, items="videos", shard_size=64)
    parser.add_argument("videos", type=Path, help="folder of videos; its subfolders are searched too")
    parser.add_argument(
        "--prompts",
        type=Path,
        help='JSON lines {"video": "cat.mp4", "prompt": ...} with paths relative to the folder; '
        "default: a text file beside each video",
    )
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.encode_videos import run as work

    work(args)


if __name__ == "__main__":
    sys.exit(main())
