"""Measure a Shapes checkpoint: a table of what the detector sees in videos of held-out prompts. Used by evaluate.py."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.generation import generate
from pipeline.request import StreamRequest
from pipeline.rollout import randn
from pipeline.sampling import sample
from pipeline.text_to_video import TextToVideo, load_pipeline
from trainer.config import Config
from utils.config import load_config
from utils.distributed import resolve_device, resolve_dtype
from utils.errors import UserError
from utils.files import atomic_write_text, ensure_writable_folder
from utils.previews import save_contact_sheet
from utils.shapes import Scene, held_out_scenes, measure, summarise
from utils.tracking import progress

COLUMNS = ("present", "colour", "shape", "size", "background", "direction", "smooth", "speed", "all_right")


def run(args: Namespace) -> None:
    """Measure a Shapes checkpoint. Print and save the table.

    Raises:
        UserError: a count is out of range, or weights cannot be used.
    """
    config = load_config(Config, args.config_path, [f"generator.weights={args.checkpoint}", *args.overrides])
    scenes = chosen_scenes(args, config)
    folder = ensure_writable_folder(args.output_folder)
    device = resolve_device(config.device)
    pipeline = load_pipeline(
        config, device=device, dtype=resolve_dtype(config.dtype, device), use_ema=config.generator.average(args.use_ema)
    )
    lengths = [1] if args.sampler == "teacher" else args.lengths
    tables = {f"{length}x": measure_length(args, config, pipeline, scenes, length, folder) for length in lengths}
    report = {
        "checkpoint": args.checkpoint,
        "sampler": args.sampler,
        "prompts": args.prompts,
        "seed": args.seed,
        "tables": tables,
    }
    atomic_write_text(folder / "table.json", json.dumps(report, indent=2) + "\n")
    print(format_table(args, tables))


def chosen_scenes(args: Namespace, config: Config) -> list[Scene]:
    """Return the held-out scenes to measure, evenly spread. Refuse counts for which there is nothing to measure."""
    scenes = held_out_scenes(config.data.shapes.world)
    available = len(scenes)
    if not 1 <= args.prompts <= available:
        raise UserError(f"--prompts={args.prompts} must be from 1 to {available}, the number of held-out prompts")
    for name, least in (("batch", args.batch), ("lengths", min(args.lengths))):
        if least < 1:
            raise UserError(f"--{name}={least} must be at least 1")
    return [scenes[index * available // args.prompts] for index in range(args.prompts)]


def measure_length(
    args: Namespace, config: Config, pipeline: TextToVideo, scenes: list[Scene], length: int, folder: Path
) -> dict[str, Any]:
    """Generate and measure one clip for each scene, ``length`` times as long as in training."""
    clips, started = [], time.perf_counter()
    for start in progress(range(0, len(scenes), args.batch), f"{length}x length", unit="batch"):
        size = config.video.height, config.video.width
        frames = config.video.num_frames * length
        requests = [
            StreamRequest(scene.prompt, *size, seed=args.seed, num_frames=frames)
            for scene in scenes[start : start + args.batch]
        ]
        clips.extend(make_clips(args.sampler, pipeline, config, requests))
    seconds = time.perf_counter() - started
    table = summarise(
        [measure(clip, scene, config.data.shapes) for clip, scene in zip(clips, scenes, strict=True)], config.video.fps
    )
    shown = range(0, len(scenes), max(1, len(scenes) // 12))
    save_contact_sheet(
        folder / f"contact_sheet_{length}x.png",
        [clips[index] for index in shown],
        [scenes[index].prompt for index in shown],
        columns_frames=12,
    )
    return table | {"generation_seconds": seconds}


def make_clips(sampler: str, pipeline: TextToVideo, config: Config, requests: list[StreamRequest]) -> Tensor:
    """Make clips [B F 3 H W] with the few-step rollout, or with the teacher's many bidirectional steps."""
    if sampler == "rollout":
        return generate(pipeline, requests)
    shape = (len(requests), *config.video.latent_shape(pipeline.codec, requests[0].num_frames))
    embeds = pipeline.text_encoder.encode([request.prompt for request in requests])
    negative = pipeline.text_encoder.encode([config.sampling.negative_prompt] * len(requests))
    noise = randn(shape, [request.generator("noise") for request in requests], embeds)
    with torch.no_grad():
        return pipeline.codec.decode(sample(pipeline.denoiser, noise, embeds, negative, config.sampling)).cpu()


def format_table(args: Namespace, tables: dict[str, dict[str, Any]]) -> str:
    """Return the table as text, with one row for each length."""
    lines = [f"{args.prompts} held-out prompts, seed {args.seed}, {args.sampler}, {args.checkpoint}"]
    rich = all("texture" in table for table in tables.values())
    columns = (*COLUMNS, "texture") if rich else COLUMNS
    lines.append("length  frames  " + "  ".join(f"{name:>10}" for name in columns))
    for length, table in tables.items():
        lines.append(f"{length:>6}  {table['frames']:>6}  " + "  ".join(f"{table[name]:10.3f}" for name in columns))
    return "\n".join(lines)
