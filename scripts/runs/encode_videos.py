"""Encodes a folder of videos to latents."""

from __future__ import annotations

import argparse
import itertools
import logging
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import VideoConfig
from pipeline.loading import load_codec
from scripts.runs.shard_job import begin
from utils.distributed import share
from utils.errors import UserError
from utils.prompts import one_line, read_entries
from utils.seeds import derive_seed
from utils.shards import ShardWriter
from utils.tracking import progress
from utils.video.read import stream_video

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Encode every video that is not in the folder yet. Raises UserError if something cannot be used."""
    prompts: dict[str, str] = {}
    job = begin(args, "data.path", check=lambda config: prompts.update(video_prompts(args.videos, args.prompts)))
    video = job.config.video
    codec = load_codec(job.config.codec, device=job.device, dtype=job.dtype)
    about = {"num_frames": video.num_frames, "height": video.height, "width": video.width, "fps": video.fps}
    skipped = 0
    with ShardWriter(job.folder, about, shard_size=args.shard_size) as writer, torch.no_grad():
        mine = {derive_seed(name): name for name in share(sorted(prompts), job.ranks.rank, job.ranks.world_size)}
        missing = {item: mine[item] for item in writer.remaining(mine)}
        for item, name in progress(missing.items(), "videos", unit="video", is_main=job.ranks.is_main):
            try:
                frames = read_clip(args.videos / name, codec.num_frames(video.num_frames), video)
            except UserError as error:
                log.warning("skipped: %s", error)
                skipped += 1
                continue
            latents = codec.encode(frames[None].to(job.device, job.dtype))[0].half()
            writer.add(item, {"video": name, "prompt": prompts[name]}, {"latents": latents})
    done = len(missing) - skipped
    print(f"{job.folder}: {done} videos encoded, {skipped} skipped, {len(mine) - len(missing)} were there already")


def video_prompts(folder: Path, listing: Path | None) -> dict[str, str]:
    """Return the prompt of every video, by its path relative to the folder.

    Files that macOS adds (`._cat.mp4`, `__MACOSX/`) are ignored.

    Raises:
        UserError: there is no video, or a video has no prompt.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of videos")
    if listing is not None:
        return _listed_prompts(folder, listing)
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    paths = [path for path in paths if not path.name.startswith("._") and "__MACOSX" not in path.parts]
    if not paths:
        raise UserError(f"{folder}: holds no videos ({', '.join(SUFFIXES)})")
    return {path.relative_to(folder).as_posix(): _prompt_beside(path) for path in paths}


def _prompt_beside(video: Path) -> str:
    text = video.with_suffix(".txt")
    try:
        prompt = one_line(text.read_text(encoding="utf-8-sig")) if text.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"{text}: is not a UTF-8 text file") from None
    if not prompt:
        raise UserError(f"{video}: has no prompt; write it to {text.name} beside it, or give --prompts")
    return prompt


def _listed_prompts(folder: Path, listing: Path) -> dict[str, str]:
    prompts = {}
    for number, entry in read_entries(listing, needs=("video", "prompt")):
        name = str(Path(entry["video"]))
        if not (folder / name).is_file():
            raise UserError(f"{listing}, line {number}: video {folder / name} not found")
        prompts[name] = one_line(entry["prompt"])
    return prompts


def read_clip(path: Path, num_frames: int, video: VideoConfig) -> Tensor:
    """Read the first frames of a video, [F 3 H W] in [-1, 1], at ``video.fps``, scaled to cover its size and cropped.

    Frame k is the one that a player shows at k / fps seconds, so that videos of any frame rate keep their speed. Only
    the needed part of the file is decoded.

    Raises:
        UserError: the video is too short or damaged.
    """
    images = list(itertools.islice(stream_video(path, video.height, video.width, video.fps), num_frames))
    if len(images) < num_frames:
        raise UserError(f"{path}: has {len(images)} frames at {video.fps} fps, but {num_frames} are needed")
    return torch.cat(images)
