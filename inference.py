"""Turn prompts into videos: python inference.py, or with a configuration, a checkpoint and prompts of your own."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import exit_code

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from model.codec import VideoCodec
    from pipeline.config import PipelineConfig, VideoConfig
    from pipeline.request import StreamRequest
    from pipeline.rollout import RolloutConfig
    from pipeline.session import StreamSession
    from pipeline.storyboard import Cue

log = logging.getLogger("inference")

SHEET_VIDEOS = 32
SHEET_FRAMES = 8
RECORDS = "videos.jsonl"
SETTINGS = ("sampler", "generator", "rollout", "sampling", "video", "device", "dtype")
EXTENDED_PROMPTS = "extended_prompts.jsonl"
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
    "vram": "vram",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="YAML file; default: %(default)s")
    add("--checkpoint_path", help="weights of the generator: a folder, .safetensors or .pt")
    add("--output_folder", help="where videos go")
    add("--data_path", help="text file with one prompt a line; with --i2v JSON lines with image and prompt")
    add("--extended_prompt_path", help="long prompts to generate from, line by line; names come from --data_path")
    add("--prompt-extend", action="store_true", help="let a text model write long prompts; see utils/prompt_extend.py")
    add("--prompt", action="append", help="a prompt; may be given several times, in place of --data_path")
    add("--extend", metavar="VIDEO", help="go on with this video; --num_output_frames then counts what is added")
    add("--v2v", metavar="VIDEO", help="follow this video, which also decides the length")
    add("--strength", type=float, default=0.6, help="how far --v2v may go from its video, above 0 up to 1")
    add(
        "--switch",
        action="append",
        metavar="'12s: PROMPT'",
        help="go on with another prompt; may be given several times",
    )
    add("--switch_style", help="cut, keep, recache (the default) or blend: what a switch does to the context")
    add(
        "--storyboard", help="YAML list of {at: 12s, prompt: a cat, style: recache}; at: 0s takes the place of --prompt"
    )
    add("--num_output_frames", help="latent frames a video")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add("--seed", help="with the prompt it decides a video; default 0")
    add("--num_samples", help="videos a prompt")
    add("--save_with_index", action="store_true", help="name files by the prompt's index")
    add("--i2v", action="store_true", help="start each video from an image")
    add("--device", help="auto, cuda, cuda:N, mps or cpu")
    add("--dtype", help="auto, float32, bfloat16 or float16")
    add("--vram", help="gigabytes of the device's memory (of RAM on a CPU) to make do with; default: what is free")
    add("--fps", help="frames per second of the files")
    add("--overwrite", action="store_true", help="make videos again that exist")
    add("--dry-run", action="store_true", help="print the resolved configuration and stop")
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9")
    return parser.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int
    sample: int
    path: Path
    image: Path | None = None
    extends: Path | None = None
    follows: Path | None = None
    strength: float = 1.0
    cues: tuple[Cue, ...] = ()

    @property
    def title(self) -> str:
        """The prompt and what else makes it another video."""
        videos = [f"{word} {path.name}" for word, path in (("after", self.extends), ("by", self.follows)) if path]
        return ", ".join([self.prompt, *videos, *map(str, self.cues)])


class Interrupted(Exception):
    """A signal asked for the end; what there was is written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        return exit_code(lambda: run(args))
    except Interrupted as end:
        log.warning("%s", end)
        return 128 + end.number  # as shells count


def run(args: argparse.Namespace) -> None:
    from pipeline.memory import check_disk
    from trainer.config import Config
    from utils.config import load_config, to_yaml
    from utils.distributed import (
        broadcast_value,
        init_distributed,
        resolve_device,
        resolve_dtype,
        share,
        share_cores,
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
    share_cores(device)  # between denoising and decoding
    check_frames(args, config)
    ensure_writable_folder(config.inference.output_folder)

    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    try:
        jobs = plan(args, config, ranks.is_main)
        check_weights(config, all_prompts(jobs), dtype)
        # One process looks, so that all deal out the same list while files appear.
        is_missing = broadcast_value([args.overwrite or not job.path.exists() for job in jobs])
        missing = [job for job, wanted in zip(jobs, is_missing, strict=True) if wanted]
        if len(missing) < len(jobs):
            log.info("%d of %d videos exist already; --overwrite makes them again", len(jobs) - len(missing), len(jobs))
        check_disk(config, len(missing))
        together = config.optimize.sequence_parallel  # then all processes make each video
        mine = missing if together else share(missing, ranks.rank, ranks.world_size)
        make_videos(config, mine, device, dtype, args.use_ema, ranks)
        finish(config, jobs, ranks)
    finally:
        shutdown_distributed()


def check_frames(args: argparse.Namespace, config: PipelineConfig) -> None:
    """Refuse a length that does not divide into chunks; with an image, the default length makes room for it."""
    from pipeline.config import Sampler
    from utils.errors import UserError

    starts = [flag for flag, given in (("--i2v", args.i2v), ("--extend", args.extend), ("--v2v", args.v2v)) if given]
    if len(starts) > 1:
        raise UserError(f"{' and '.join(starts)} say different things of how a video starts; use one of them")
    if not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength:g} must be above 0 and at most 1")
    if args.v2v and config.sampler is not Sampler.rollout:
        raise UserError(f"--v2v cannot be used with sampler={config.sampler.value}; use sampler=rollout")
    if config.sampler is Sampler.many_step:
        if starts:
            raise UserError(f"{starts[0]} cannot be used with sampler=many_step; use a causal generator")
        return  # it has no chunks
    chosen = args.num_output_frames is not None or any(text.startswith("video.num_frames=") for text in args.overrides)
    if args.i2v and not chosen and not config.rollout.independent_first_frame:
        config.video.num_frames += 1
    try:
        config.rollout.chunks(config.video.num_frames - args.i2v, int(args.i2v or args.extend is not None))
    except ValueError as error:
        image = ", and 1 for the image" if args.i2v else ""
        raise UserError(f"video.num_frames={config.video.num_frames} (--num_output_frames): {error}{image}") from None


def plan(args: argparse.Namespace, config: PipelineConfig, is_main: bool) -> list[Job]:
    """Every video of this run, in order."""
    from utils.errors import UserError
    from utils.files import safe_stem
    from utils.prompts import read_image_prompts, read_prompts

    opening, cues = storyboard(args, config)
    images: list[Path | None]
    if args.i2v:
        if args.prompt:
            raise UserError("--prompt cannot be used with --i2v; list images and prompts in --data_path")
        images, names = read_image_prompts(config.inference.data_path)
    else:
        names = opening or args.prompt or read_prompts(config.inference.data_path)
        images = [None] * len(names)
    if any(not name.strip() for name in names):
        raise UserError("--prompt is empty; write what the video should show")
    prompts = long_prompts(args, config, names, is_main)
    folder, seed, kind = (
        Path(config.inference.output_folder),
        config.inference.seed,
        "ema" if args.use_ema else "regular",
    )
    extends, follows = (None if video is None else existing_video(video) for video in (args.extend, args.v2v))
    jobs: dict[Path, Job] = {}
    for index, (name, prompt, image) in enumerate(zip(names, prompts, images, strict=True)):
        for sample in range(config.inference.num_samples):
            job = Job(prompt, seed, sample, folder, image, extends, follows, args.strength, cues)
            title = replace(job, prompt=name).title
            stem = f"{index}-{sample}_{kind}" if args.save_with_index else f"{safe_stem(title)}-{sample}"
            job = replace(job, path=folder / f"{stem}.mp4")
            if jobs.setdefault(job.path, job) != job:  # the same name for another extended prompt or image
                job = replace(job, path=folder / f"{stem}_{index}.mp4")
                jobs[job.path] = job
    return list(jobs.values())


def storyboard(args: argparse.Namespace, config: PipelineConfig) -> tuple[list[str], tuple[Cue, ...]]:
    """The prompt a storyboard opens with, if it does, and the prompts to come."""
    from pipeline.config import Sampler
    from pipeline.sizes import codec_sizes
    from pipeline.storyboard import check_cues, parse_style, parse_switch, read_storyboard
    from utils.errors import UserError

    style = parse_style(args.switch_style or "recache", "--switch_style")
    if args.storyboard and args.switch:
        raise UserError("--storyboard and --switch both say what comes when; use one of them")
    if args.switch_style and not (args.storyboard or args.switch):
        raise UserError("--switch_style says nothing without --switch or --storyboard")
    cues = [parse_switch(text, style) for text in args.switch or []]
    if args.storyboard:
        cues = read_storyboard(args.storyboard, style)
    if cues and config.sampler is not Sampler.rollout:
        raise UserError(f"prompts cannot change with sampler={config.sampler.value}; use sampler=rollout")
    opening = [cues.pop(0).prompt] if args.storyboard and cues[0].seconds == 0 else []
    if opening and (args.prompt or args.data_path or args.i2v or args.prompt_extend):
        raise UserError(
            "a prompt at 0s is the video's first; leave out --prompt, --data_path, --i2v and --prompt-extend"
        )
    scale = codec_sizes(config.codec).temporal_scale
    frames = (
        math.inf
        if args.v2v
        else config.video.num_frames * scale
        if args.extend
        else 1 + (config.video.num_frames - 1) * scale
    )
    check_cues(cues, frames / config.video.fps)
    return opening, tuple(cues)


def existing_video(path: str) -> Path:
    """The path of a video that can be read."""
    from utils.video import stream_video

    next(stream_video(path, 16, 16, 1))
    return Path(path)


def all_prompts(jobs: list[Job]) -> list[str]:
    """Every prompt of the jobs, once."""
    prompts = (prompt for job in jobs for prompt in (job.prompt, *(cue.prompt for cue in job.cues)))
    return list(dict.fromkeys(prompts))


def long_prompts(args: argparse.Namespace, config: PipelineConfig, names: list[str], is_main: bool) -> list[str]:
    """What to generate from: the prompts themselves, those of another file, or what a text model makes of them."""
    from utils.distributed import broadcast_value
    from utils.errors import UserError
    from utils.prompts import read_prompts

    if args.prompt_extend:
        if args.extended_prompt_path:
            raise UserError("--prompt-extend and --extended_prompt_path both give long prompts; use one of them")
        from utils.prompt_extend import extend_prompts

        file = Path(config.inference.output_folder) / EXTENDED_PROMPTS
        return broadcast_value(extend_prompts(names, file) if is_main else names)
    if not args.extended_prompt_path:
        return names
    prompts = read_prompts(args.extended_prompt_path)
    if len(prompts) != len(names):
        raise UserError(f"{args.extended_prompt_path}: {len(prompts)} prompts for {len(names)} names")
    return prompts


def check_weights(config: PipelineConfig, prompts: list[str], dtype) -> None:
    """Refuse missing weights, and sizes they cannot make, before anything heavy loads.

    The text encoder may be missing where the embeddings of all prompts are on disk.
    """
    from model.weights import not_found
    from pipeline.loading import needs_text_encoder
    from pipeline.sizes import token_size
    from utils.errors import UserError

    for key, section in (
        ("generator", config.generator),
        ("text_encoder", config.text_encoder),
        ("codec", config.codec),
    ):
        if section.weights is None:
            raise UserError(f"{key}.weights is null; give the path of a file or folder of weights")
        stored = key == "text_encoder" and not needs_text_encoder(config, prompts, dtype)
        if not stored and not Path(section.weights).exists():
            raise not_found(section.weights)
    rows, columns = token_size(config)
    height, width = config.video.height, config.video.width
    if height % rows or width % columns:
        raise UserError(f"video.height={height}, video.width={width}: must be multiples of {rows} and {columns}")


def make_videos(config: PipelineConfig, jobs: list[Job], device, dtype, use_ema: bool, ranks) -> None:
    """Load the pipeline and make this process's videos."""
    from pipeline import memory
    from pipeline.loading import generator_hash, needs_text_encoder
    from pipeline.session import StreamSession
    from pipeline.text_to_video import load_pipeline
    from utils.tracking import progress

    if not jobs:
        return
    prompts = all_prompts(jobs)
    parts = {"device": device, "dtype": dtype, "use_ema": use_ema}
    chosen = memory.plan(config, text=needs_text_encoder(config, prompts, dtype), processes=ranks.world_size, **parts)
    log.info(chosen.line)
    pipeline = load_pipeline(config, profile=chosen.profile, prompts=prompts, **parts)
    digest = generator_hash(config.generator, use_ema=use_ema)
    writes = ranks.is_main or not config.optimize.sequence_parallel
    total = len(jobs) * pipeline.codec.num_frames(config.video.num_frames)
    with progress(total, "frames", unit="frame", is_main=ranks.is_main) as bar:
        for job in jobs:
            started = time.perf_counter()
            session = StreamSession(pipeline, request(job, config, pipeline.codec))
            with stopped_by_signals(session) as signals:
                frames = write_video(session, job, config.video, bar) if writes else sum(1 for _ in session)
            seconds = time.perf_counter() - started
            if frames and writes:
                append_record(config, job, {"weights": digest, "frames": frames, "seconds": round(seconds, 3)})
                log.info("%s  %d frames in %.2f s, %.1f frames/s", job.path, frames, seconds, frames / seconds)
            if signals:
                raise Interrupted(signals[0])


def request(job: Job, config: PipelineConfig, codec: VideoCodec) -> StreamRequest:
    """What a job asks of the pipeline. The times of its cues count from where its own frames begin."""
    from pipeline.request import StreamRequest
    from pipeline.storyboard import schedule
    from utils.video import load_image, stream_video

    video = config.video
    size, context, num_frames, shown = (video.height, video.width), None, video.num_frames, 0
    if job.image is not None:
        context = load_image(job.image, *size)[None]
    elif job.extends is not None:
        context = last_frames(stream_video(job.extends, *size, video.fps), config.rollout, codec)
        num_frames, shown = num_frames + codec.num_latents(len(context)), len(context)
    return StreamRequest(
        job.prompt,
        *size,
        seed=job.seed,
        sample=job.sample,
        num_frames=num_frames if job.follows is None else None,
        context_frames=context,
        source=None if job.follows is None else stream_video(job.follows, *size, video.fps),
        strength=job.strength,
        switches=schedule(job.cues, video.fps, begin=shown),
    )


def last_frames(frames: Iterable[Tensor], rollout: RolloutConfig, codec: VideoCodec) -> Tensor:
    """As many of the last frames [F 3 H W] as the first new chunk sees, or two chunks where it sees all."""
    import torch

    chunk = rollout.frames_per_chunk
    seen = 2 * chunk if rollout.window is None else max(1, rollout.window - chunk)
    kept = torch.cat(list(deque(frames, maxlen=codec.num_frames(seen))))
    return kept[(len(kept) - 1) % codec.temporal_scale :]


@contextmanager
def stopped_by_signals(session: StreamSession) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM stop the session, so that its file is closed in order; yields those that came."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        session.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_video(session: StreamSession, job: Job, video: VideoConfig, bar: tqdm) -> int:
    """Write a session's chunks to a file as they come; returns the number of frames, and leaves no file for none.

    A video that is extended comes first, fitted to the size, in place of the chunk of its last frames.
    """
    from utils.video import VideoWriter, stream_video

    with closing(iter(session)) as chunks:
        first, frames = next(chunks, None), 0
        if first is None:
            return 0
        begin = [first.frames]
        if job.extends is not None:
            begin = stream_video(job.extends, video.height, video.width, video.fps)
        with (
            VideoWriter(job.path, video.fps, scale=video.scale) as writer,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as worker,
        ):
            writing = worker.submit(len, ())
            for part in itertools.chain(begin, (chunk.frames for chunk in chunks)):
                writing.result()  # one at a time, while the next chunk is made
                writing = worker.submit(writer.write, part)
                frames += len(part)
                bar.update(len(part))
            writing.result()
    return frames


def append_record(config: PipelineConfig, job: Job, figures: dict) -> None:
    """Add one JSON line about a finished video; one write, so that processes do not mix."""
    from utils.config import to_dict

    settings = to_dict(config)
    record = {
        "file": job.path.name,
        "prompt": job.prompt,
        "seed": job.seed,
        "sample": job.sample,
        "image": None if job.image is None else str(job.image),
        "extends": None if job.extends is None else str(job.extends),
        "follows": None if job.follows is None else {"video": str(job.follows), "strength": job.strength},
        "switches": [{"at": cue.seconds, "prompt": cue.prompt, "style": cue.style.value} for cue in job.cues],
        **figures,
        "frames_per_second": round(figures["frames"] / figures["seconds"], 2),
        "settings": {name: settings[name] for name in SETTINGS},
    }
    with open(job.path.parent / RECORDS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def finish(config: PipelineConfig, jobs: list[Job], ranks) -> None:
    """Once every process is done, draw the contact sheet and keep the latest record of each video."""
    from utils.config import save_config
    from utils.distributed import barrier
    from utils.video import sample_frames, save_contact_sheet

    barrier()
    if not ranks.is_main:
        return
    shown, folder = jobs[:SHEET_VIDEOS], Path(config.inference.output_folder)
    save_config(config, folder / "config.yaml")
    keep_latest_records(folder / RECORDS)
    sheet = folder / "contact_sheet.png"
    save_contact_sheet(
        sheet,
        [sample_frames(job.path, SHEET_FRAMES) for job in shown],
        [job.title for job in shown],
    )
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
