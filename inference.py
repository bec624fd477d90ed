"""Turn prompts into videos: python inference.py, or with a configuration, a checkpoint and prompts of your own."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import exit_code

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.loading import PartsConfig
    from pipeline.text_to_video import TextToVideo, VideoSeed

log = logging.getLogger("inference")

SHEET_VIDEOS = 32
RECORDS = "videos.jsonl"
FLAGS = {
    "checkpoint_path": "generator.weights",
    "output_folder": "inference.output_folder",
    "data_path": "inference.data_path",
    "num_output_frames": "video.num_frames",
    "seed": "inference.seed",
    "num_samples": "inference.num_samples",
    "fps": "video.fps",
    "device": "device",
    "dtype": "dtype",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="YAML file; default: %(default)s")
    add("--checkpoint_path", help="weights of the generator: a folder, .safetensors or .pt")
    add("--output_folder", help="where videos go")
    add("--data_path", help="text file with one prompt a line; with --i2v JSON lines with image and prompt")
    add("--extended_prompt_path", help="long prompts to generate from, line by line; names come from --data_path")
    add("--prompt", action="append", help="a prompt; may be given several times, in place of --data_path")
    add("--num_output_frames", help="latent frames a video")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add("--seed", help="with the prompt it decides a video; default 0")
    add("--num_samples", help="videos a prompt")
    add("--save_with_index", action="store_true", help="name files by the prompt's index")
    add("--i2v", action="store_true", help="start each video from an image")
    add("--device", help="auto, cuda, cuda:N, mps or cpu")
    add("--dtype", help="auto, float32, bfloat16 or float16")
    add("--fps", help="frames per second of the files")
    add("--overwrite", action="store_true", help="make videos again that exist")
    add("--dry-run", action="store_true", help="print the resolved configuration and stop")
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9")
    return parser.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Job:
    """One video to make."""

    video: VideoSeed
    path: Path
    image: Path | None


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from trainer.config import Config
    from utils.config import load_config, to_yaml
    from utils.distributed import (
        broadcast_object,
        init_distributed,
        resolve_device,
        resolve_dtype,
        share,
        shutdown_distributed,
    )
    from utils.files import ensure_writable_folder
    from utils.tracking import setup_logging

    flags = [f"{key}={value}" for flag, key in FLAGS.items() if (value := getattr(args, flag)) is not None]
    config = load_config(Config, args.config_path, [*flags, *args.overrides])
    if args.dry_run:
        print(to_yaml(config), end="")
        return
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_frames(args, config)
    jobs = plan(args, config)
    ensure_writable_folder(config.inference.output_folder)
    check_weights(config)

    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    try:
        # One process looks, so that all deal out the same list while files appear.
        missing = broadcast_object([job for job in jobs if args.overwrite or not job.path.exists()])
        if len(missing) < len(jobs):
            log.info("%d of %d videos exist already; --overwrite makes them again", len(jobs) - len(missing), len(jobs))
        make_videos(config, share(missing, ranks.rank, ranks.world_size), device, dtype, args.use_ema, ranks)
        finish(config, jobs, ranks)
    finally:
        shutdown_distributed()


def check_frames(args: argparse.Namespace, config: PartsConfig) -> None:
    """Refuse a length that does not divide into chunks; with an image, the default length makes room for it."""
    from utils.errors import UserError

    chosen = args.num_output_frames is not None or any(text.startswith("video.num_frames=") for text in args.overrides)
    if args.i2v and not chosen and not config.rollout.independent_first_frame:
        config.video.num_frames += 1
    try:
        config.rollout.chunks(config.video.num_frames - args.i2v, int(args.i2v))
    except ValueError as error:
        image = ", and 1 for the image" if args.i2v else ""
        raise UserError(f"video.num_frames={config.video.num_frames} (--num_output_frames): {error}{image}") from None


def plan(args: argparse.Namespace, config: PartsConfig) -> list[Job]:
    """Every video of this run, in order."""
    from pipeline.text_to_video import VideoSeed
    from utils.errors import UserError
    from utils.files import safe_stem
    from utils.prompts import read_image_prompts, read_prompts

    images: list[Path | None]
    if args.i2v:
        if args.prompt:
            raise UserError("--prompt cannot be used with --i2v; list images and prompts in --data_path")
        images, names = read_image_prompts(config.inference.data_path)
    else:
        names = args.prompt or read_prompts(config.inference.data_path)
        images = [None] * len(names)
    if any(not name.strip() for name in names):
        raise UserError("--prompt is empty; write what the video should show")
    prompts = names
    if args.extended_prompt_path:
        prompts = read_prompts(args.extended_prompt_path)
        if len(prompts) != len(names):
            raise UserError(f"{args.extended_prompt_path}: {len(prompts)} prompts for {len(names)} names")

    folder, seed, kind = (
        Path(config.inference.output_folder),
        config.inference.seed,
        "ema" if args.use_ema else "regular",
    )
    jobs: dict[Path, Job] = {}
    for index, (name, prompt, image) in enumerate(zip(names, prompts, images, strict=True)):
        for sample in range(config.inference.num_samples):
            stem = f"{index}-{sample}_{kind}" if args.save_with_index else f"{safe_stem(name)}-{sample}"
            job = Job(VideoSeed(seed, prompt, sample), folder / f"{stem}.mp4", image)
            if jobs.setdefault(job.path, job) != job:  # the same name for another extended prompt or image
                job = replace(job, path=folder / f"{stem}_{index}.mp4")
                jobs[job.path] = job
    return list(jobs.values())


def check_weights(config: PartsConfig) -> None:
    """Refuse missing weights, and sizes they cannot make, before anything heavy loads."""
    from model.weights import not_found
    from pipeline.loading import token_size
    from utils.errors import UserError

    for key, section in (
        ("generator", config.generator),
        ("text_encoder", config.text_encoder),
        ("codec", config.codec),
    ):
        if section.weights is None:
            raise UserError(f"{key}.weights is null; give the path of a file or folder of weights")
        if not Path(section.weights).exists():
            raise not_found(section.weights)
    rows, columns = token_size(config)
    height, width = config.video.height, config.video.width
    if height % rows or width % columns:
        raise UserError(f"video.height={height}, video.width={width}: must be multiples of {rows} and {columns}")


def make_videos(config: PartsConfig, jobs: list[Job], device, dtype, use_ema: bool, ranks) -> None:
    """Load the pipeline and make this process's videos."""
    from model.weights import weights_hash
    from pipeline.text_to_video import TextToVideo
    from utils.tracking import progress

    if not jobs:
        return
    pipeline = TextToVideo.from_config(config, device=device, dtype=dtype, use_ema=use_ema)
    digest = weights_hash(pipeline.denoiser.transformer.state_dict())
    for job in progress(jobs, "videos", unit="video", is_main=ranks.is_main):
        started = time.perf_counter()
        frames = make_video(pipeline, job, config)
        seconds = time.perf_counter() - started
        append_record(config, job, {"weights": digest, "frames": frames, "seconds": round(seconds, 3)})
        log.info("%s  %d frames in %.2f s, %.1f frames/s", job.path, frames, seconds, frames / seconds)


def make_video(pipeline: TextToVideo, job: Job, config: PartsConfig) -> int:
    """Stream one video to its file; returns its number of frames."""
    from utils.video import VideoWriter, load_image

    video = config.video
    context: Tensor | None = None
    if job.image is not None:
        context = load_image(job.image, video.height, video.width)[None, None]
    frames = 0
    with VideoWriter(job.path, video.fps, scale=video.scale) as writer:
        for chunk in pipeline.stream(
            [job.video], height=video.height, width=video.width, num_frames=video.num_frames, context_frames=context
        ):
            writer.write(chunk[0])
            frames += chunk.shape[1]
    return frames


def append_record(config: PartsConfig, job: Job, figures: dict) -> None:
    """Add one JSON line about a finished video; one write, so that processes do not mix."""
    from utils.config import to_dict

    settings = to_dict(config)
    record = {
        "file": job.path.name,
        "prompt": job.video.prompt,
        "seed": job.video.seed,
        "sample": job.video.sample,
        "image": None if job.image is None else str(job.image),
        **figures,
        "frames_per_second": round(figures["frames"] / figures["seconds"], 2),
        "settings": {name: settings[name] for name in ("generator", "rollout", "video", "device", "dtype")},
    }
    with open(job.path.parent / RECORDS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def finish(config: PartsConfig, jobs: list[Job], ranks) -> None:
    """Once every process is done, draw the contact sheet and keep the latest record of each video."""
    from utils.config import save_config
    from utils.distributed import barrier
    from utils.video import read_video, save_contact_sheet

    barrier()
    if not ranks.is_main:
        return
    shown, folder = jobs[:SHEET_VIDEOS], Path(config.inference.output_folder)
    save_config(config, folder / "config.yaml")
    keep_latest_records(folder / RECORDS)
    sheet = folder / "contact_sheet.png"
    save_contact_sheet(sheet, [read_video(job.path) for job in shown], [job.video.prompt for job in shown])
    log.info("%d videos in %s, contact sheet %s", len(jobs), folder, sheet)


def keep_latest_records(path: Path) -> None:
    """One line a video: the record of its latest making."""
    from utils.files import atomic_write_text

    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    latest = {json.loads(line)["file"]: line for line in lines}
    atomic_write_text(path, "".join(f"{line}\n" for line in latest.values()))


if __name__ == "__main__":
    sys.exit(main())
