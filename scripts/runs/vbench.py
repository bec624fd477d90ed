"""Make videos with VBench's file names and score them: the work of evaluate.py --vbench."""

from __future__ import annotations

import json
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from pipeline.config import PipelineConfig, Sampler, load_pipeline_config
from pipeline.inference.options import InferenceOptions
from pipeline.inference.run import run as make_videos
from utils.distributed import init_distributed, resolve_device
from utils.drift import MEASURES, measure_drift, summarise_drift
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.tracking import progress
from utils.video.read import read_video
from utils.video.write import VideoWriter

log = logging.getLogger("evaluate")

SAMPLES = 5  # videos for each prompt, as VBench asks
CLIP_SECONDS = 2  # length of the clips that VBench-Long scores
CLIPS = "split_clip"  # VBench-Long's name for the folder of clips
# What VBench-Long's own program (eval_long.py of vbench 0.1.5) passes by default.
LONG_OPTIONS = {
    "use_semantic_splitting": False,
    "clip_length_config": "clip_length_mix.yaml",
    "sb_clip2clip_feat_extractor": "dino",
    "bg_clip2clip_feat_extractor": "clip",
    "w_inclip": 1.0,
    "w_clip2clip": 0.0,
    "num_of_samples_per_prompt": SAMPLES,
    "static_filter_flag": False,
    "dev_flag": False,
    "imaging_quality_preprocessing_mode": "longer",
}
CUSTOM_DIMENSIONS = [
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]
"""The dimensions that VBench can score for other prompts than its own."""


def run(args: Namespace) -> None:
    """Make the videos, measure drift and flicker, and score them if VBench is installed.

    Under torchrun the processes share the videos. A run that was stopped continues.

    Raises:
        UserError: an input cannot be used, or this version of VBench is unknown.
    """
    config = _config(args)
    options = InferenceOptions(
        data_path=args.data_path,
        extended_prompt_path=args.extended_prompt_path,
        use_ema=args.use_ema,
        exact_names=True,  # VBench scores whatever bears the name of a prompt
    )
    videos = make_videos(config, options)
    if init_distributed(resolve_device(config.device).type).is_main:
        _measure(args, config, videos)


def _config(args: Namespace) -> PipelineConfig:
    if args.data_path is None:
        raise UserError("--vbench needs --data_path: VBench's prompts, one a line (its file is all_dimension.txt)")
    keys = {
        "generator.weights": args.checkpoint,
        "inference.output_folder": args.vbench,
        "inference.data_path": args.data_path,
        "inference.num_samples": SAMPLES,
        "inference.seed": args.seed,
        **({"sampler": Sampler.many_step.name} if args.sampler == "teacher" else {}),
    }
    return load_pipeline_config(args.config_path, [*(f"{key}={value}" for key, value in keys.items()), *args.overrides])


def _measure(args: Namespace, config: PipelineConfig, videos: list[Path]) -> None:
    """Print and save one table. The measures are saved before VBench begins, which may fail."""
    folder = Path(args.vbench)
    drifts = []
    for path in progress(videos, "drift", unit="video"):
        frames = read_video(path)
        drifts.append(measure_drift(frames, config.video.fps))
        if args.long:
            cut_into_clips(path, frames, config.video.fps, folder / CLIPS)
    report = {"videos": len(videos), "drift": summarise_drift(drifts), "vbench": {}}
    _save(report, folder)
    try:
        report["vbench"] = _scores(args, config, folder, videos)
        _save(report, folder)
    finally:
        print(format_scores(report))


def _save(report: dict, folder: Path) -> None:
    atomic_write_text(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")


def cut_into_clips(path: Path, frames: Tensor, fps: float, folder: Path) -> list[Path]:
    """Cut a video, uint8 [F H W 3], into clips of two seconds as VBench-Long names them: NAME/NAME_000.mp4.

    The last clip begins earlier, so that it is as long as the others. Clips that are newer than the video are kept.
    """
    target = folder / path.stem
    target.mkdir(parents=True, exist_ok=True)
    made = []
    for number, clip in enumerate(clips(frames, round(CLIP_SECONDS * fps))):
        made.append(target / f"{path.stem}_{number:03d}.mp4")
        if not made[-1].exists() or made[-1].stat().st_mtime_ns < path.stat().st_mtime_ns:
            with VideoWriter(made[-1], fps) as writer:
                writer.write(clip)
    return made


def clips(frames: Tensor, count: int) -> Iterator[Tensor]:
    """Yield pieces of ``count`` frames that cover all frames; one piece if there are fewer."""
    for start in range(0, len(frames), count):
        start = max(0, min(start, len(frames) - count))
        yield frames[start : start + count]


def _scores(args: Namespace, config: PipelineConfig, folder: Path, videos: Sequence[Path]) -> dict[str, float]:
    """Return VBench's score of each dimension; empty if it is not installed."""
    package = "vbench2_beta_long" if args.long else "vbench"
    if find_spec(package) is None:
        log.info("%s is not installed (pip install vbench), so only drift and flicker are measured", package)
        return {}
    kind = "long_" if args.long else ""
    standard = args.vbench_info is not None
    chosen = args.dimensions.split(",") if args.dimensions else None
    scorer = _scorer(package)(resolve_device(config.device), args.vbench_info or "", str(folder / "vbench"))
    scorer.evaluate(
        videos_path=str(lay_out(videos, folder, long=args.long)),
        name="scores",
        dimension_list=chosen or (None if standard else CUSTOM_DIMENSIONS),
        mode=f"{kind}vbench_standard" if standard else f"{kind}custom_input",
        **(LONG_OPTIONS if args.long else {}),
    )
    file = folder / "vbench" / "scores_eval_results.json"
    if not file.is_file():
        raise UserError(f"{file}: {package} has not written its scores there; this program does not know this version")
    return {name: float(values[0]) for name, values in json.loads(file.read_text()).items()}


def lay_out(videos: Sequence[Path], folder: Path, *, long: bool) -> Path:
    """Return a folder ``vbench/videos`` with links to the videos, and to their clips for VBench-Long.

    VBench takes every mp4, gif, jpg and png of a folder for a video, and the ending of its first file for that of all.
    So the folder holds nothing else.
    """
    target = folder / "vbench" / "videos"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for video in videos:
        _link(video, target / video.name)
        for clip in sorted((folder / CLIPS / video.stem).glob("*.mp4")) if long else ():
            _link(clip, target / CLIPS / video.stem / clip.name)
    return target


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # a file system without hard links
        shutil.copy2(file, target)


def _scorer(package: str):
    if package == "vbench":
        from vbench import VBench

        return VBench
    from vbench2_beta_long import VBenchLong

    return VBenchLong


def format_scores(report: dict) -> str:
    """Return the report as text, with one row for each measure. A change of 1 means no drift."""
    lines = [f"{report['videos']} videos", f"{'':>14}  {'first':>8}  {'last':>8}  {'change':>8}"]
    for name in MEASURES:
        values = report["drift"][name]
        lines.append(f"{name:>14}  {values['first']:8.3f}  {values['last']:8.3f}  {values['change']:8.3f}")
    lines += [f"{name:>24}  {score:.4f}" for name, score in report["vbench"].items()]
    return "\n".join(lines)
