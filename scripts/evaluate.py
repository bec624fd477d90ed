"""Measure a checkpoint: a Shapes one with the detector on held-out prompts, any one with --vbench; print a table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

COLUMNS = ("present", "colour", "shape", "size", "background", "direction", "smooth", "speed", "all_right")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="weights of the generator or the teacher: folder, .safetensors or .pt")
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add(
        "--sampler",
        choices=("rollout", "teacher"),
        default="rollout",
        help="few-step rollout, or many bidirectional steps",
    )
    add("--prompts", type=int, default=96, help="held-out prompts measured")
    add("--lengths", type=int, nargs="+", default=[1, 4], help="multiples of the training length")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=16)
    add("--output_folder", default="logs/evaluate", help="for the JSON table and the contact sheets")
    add("overrides", nargs="*", metavar="key=value")
    add = parser.add_argument_group("videos for VBench, of any model").add_argument
    add("--vbench", metavar="FOLDER", help="make 5 videos a prompt in VBench's names and measure them; default: off")
    add("--data_path", metavar="FILE", help="prompts, one a line: VBench's all_dimension.txt")
    add("--extended_prompt_path", metavar="FILE", help="long prompts, paired line by line with --data_path")
    add("--vbench_info", metavar="FILE", help="VBench_full_info.json, for VBench's own prompts; default: other prompts")
    add("--dimensions", metavar="NAME,NAME", help="what VBench scores, with commas; default: all that it can")
    add("--long", action="store_true", help="cut the videos into clips of 2 s and score them as VBench-Long does")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if args.vbench is not None:
        from scripts.vbench import run as evaluate_videos

        evaluate_videos(args)
        return
    from pipeline.text_to_video import load_pipeline
    from trainer.config import Config
    from utils.config import load_config
    from utils.distributed import resolve_device, resolve_dtype
    from utils.files import atomic_write_text, ensure_writable_folder

    config = load_config(Config, args.config_path, [f"generator.weights={args.checkpoint}", *args.overrides])
    check_counts(args)
    folder = ensure_writable_folder(args.output_folder)
    device = resolve_device(config.device)
    pipeline = load_pipeline(
        config, device=device, dtype=resolve_dtype(config.dtype, device), use_ema=config.generator.average(args.use_ema)
    )
    lengths = [1] if args.sampler == "teacher" else args.lengths
    tables = {f"{length}x": measure_length(args, config, pipeline, length, folder) for length in lengths}
    report = {
        "checkpoint": args.checkpoint,
        "sampler": args.sampler,
        "prompts": args.prompts,
        "seed": args.seed,
        "tables": tables,
    }
    atomic_write_text(folder / "table.json", json.dumps(report, indent=2) + "\n")
    print(format_table(args, tables))


def check_counts(args: argparse.Namespace) -> None:
    """Refuse counts for which there is nothing to measure."""
    from utils.errors import UserError
    from utils.shapes import held_out_scenes

    available = len(held_out_scenes())
    if not 1 <= args.prompts <= available:
        raise UserError(f"--prompts={args.prompts} must be from 1 to {available}, the number of held-out prompts")
    for name, least in (("batch", args.batch), ("lengths", min(args.lengths))):
        if least < 1:
            raise UserError(f"--{name}={least} must be at least 1")


def measure_length(args: argparse.Namespace, config, pipeline, length: int, folder: Path) -> dict:
    """Generate and measure one clip a held-out prompt, ``length`` times as long as in training."""
    from pipeline.request import StreamRequest
    from utils.shapes import held_out_scenes, measure, summarise
    from utils.tracking import progress
    from utils.video import save_contact_sheet

    scenes = held_out_scenes()[: args.prompts]
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


def make_clips(sampler: str, pipeline, config, requests: list):
    """Make clips [B F 3 H W] with the few-step rollout, or with the teacher's many bidirectional steps."""
    import torch

    from pipeline.generation import generate
    from pipeline.rollout import randn
    from pipeline.sampling import sample

    if sampler == "rollout":
        return generate(pipeline, requests)
    shape = (len(requests), *config.video.latent_shape(pipeline.codec, requests[0].num_frames))
    embeds = pipeline.text_encoder.encode([request.prompt for request in requests])
    negative = pipeline.text_encoder.encode([config.sampling.negative_prompt] * len(requests))
    noise = randn(shape, [request.generator("noise") for request in requests], embeds)
    with torch.no_grad():
        return pipeline.codec.decode(sample(pipeline.denoiser, noise, embeds, negative, config.sampling)).cpu()


def format_table(args: argparse.Namespace, tables: dict[str, dict]) -> str:
    """Return the table as text, with one row for each length."""
    lines = [f"{args.prompts} held-out prompts, seed {args.seed}, {args.sampler}, {args.checkpoint}"]
    lines.append("length  frames  " + "  ".join(f"{name:>10}" for name in COLUMNS))
    for length, table in tables.items():
        lines.append(f"{length:>6}  {table['frames']:>6}  " + "  ".join(f"{table[name]:10.3f}" for name in COLUMNS))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
