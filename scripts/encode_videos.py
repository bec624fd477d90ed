"""Encode a folder of videos to latents, once, into the folder data.path, for data.kind=videos.

Every video needs its prompt in a text file of the same name beside it (cat.mp4, cat.txt), or in --prompts. The first
video.num_frames latent frames are kept, at video.fps, scaled and cropped to video.height x video.width.
Run it again to go on after an interruption, or when videos were added.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import VideoConfig

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")

log = logging.getLogger(__name__)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("videos", type=Path, help="folder of videos, searched with its subfolders")
    add("--config_path", default="configs/shapes/diffusion_forcing.yaml")
    add("--prompts", type=Path, help='JSON lines {"video": "cat.mp4", "prompt": ...}, paths relative to the folder')
    add("--shard_size", type=int, default=64, help="videos a file; an interruption loses at most as many")
    add("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from pipeline.loading import load_codec
    from trainer.config import Config
    from utils.config import load_config
    from utils.distributed import derive_seed, init_distributed, resolve_device, resolve_dtype, share
    from utils.errors import UserError
    from utils.shards import ShardWriter
    from utils.tracking import progress, setup_logging

    config = load_config(Config, args.config_path, args.overrides)
    video, folder = config.video, config.data.path
    if folder is None:
        raise UserError("data.path is null; name the folder to fill: data.path=FOLDER")
    if args.shard_size < 1:
        raise UserError(f"--shard_size={args.shard_size} must be at least 1")
    prompts = video_prompts(args.videos, args.prompts)
    device = resolve_device(config.device)
    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    dtype = resolve_dtype(config.dtype, device)
    codec = load_codec(config.codec, device=device, dtype=dtype)
    about = {"num_frames": video.num_frames, "height": video.height, "width": video.width, "fps": video.fps}
    skipped = 0
    with ShardWriter(folder, about, shard_size=args.shard_size) as writer, torch.no_grad():
        mine = {derive_seed(name): name for name in share(sorted(prompts), ranks.rank, ranks.world_size)}
        missing = {item: mine[item] for item in writer.remaining(mine)}
        for item, name in progress(missing.items(), "videos", unit="video", is_main=ranks.is_main):
            try:
                frames = read_clip(args.videos / name, codec.num_frames(video.num_frames), video)
            except UserError as error:
                log.warning("skipped: %s", error)
                skipped += 1
                continue
            latents = codec.encode(frames[None].to(device, dtype))[0].half()
            writer.add(item, {"video": name, "prompt": prompts[name]}, {"latents": latents})
    done = len(missing) - skipped
    print(f"{done} videos encoded, {skipped} skipped, {len(mine) - len(missing)} were there already, in {folder}")


def video_prompts(folder: Path, listing: Path | None) -> dict[str, str]:
    """The prompt of every video, by its path relative to the folder; UserError names a video that has none."""
    from utils.errors import UserError

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of videos")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    if not names:
        raise UserError(f"{folder}: holds no videos ({', '.join(SUFFIXES)})")
    if listing is not None:
        return _listed_prompts(folder, listing)
    prompts = {}
    for name in names:
        text = (folder / name).with_suffix(".txt")
        prompts[name] = " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""
        if not prompts[name]:
            raise UserError(f"{folder / name}: has no prompt; write it to {text.name} beside it, or give --prompts")
    return prompts


def _listed_prompts(folder: Path, listing: Path) -> dict[str, str]:
    from utils.errors import UserError
    from utils.prompts import one_line, read_entries

    prompts = {}
    for number, entry in read_entries(listing, needs=("video", "prompt")):
        name = str(Path(entry["video"]))
        if not (folder / name).is_file():
            raise UserError(f"{listing}, line {number}: video {folder / name} not found")
        prompts[name] = one_line(entry["prompt"])
    return prompts


def read_clip(path: Path, num_frames: int, video: VideoConfig) -> Tensor:
    """The first frames [F 3 H W] in [-1, 1] of a video at ``video.fps``, scaled to cover its size and cropped.

    Frame k is the one shown at k / fps seconds, so that other frame rates keep their speed; only what is needed is
    decoded. UserError if the video is too short or damaged.
    """
    import torch

    from utils.errors import UserError
    from utils.video import stream_video

    images = list(itertools.islice(stream_video(path, video.height, video.width, video.fps), num_frames))
    if len(images) < num_frames:
        raise UserError(f"{path}: has {len(images)} frames at {video.fps} fps; {num_frames} are needed")
    return torch.cat(images)


if __name__ == "__main__":
    sys.exit(main())
