"""Makes and measures the videos of a row. The results of a row and a training are one file, which is made once."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.generation import generate
from pipeline.request import StreamRequest
from pipeline.text_to_video import TextToVideo, load_pipeline
from scripts.reproduction.metrics import codec_features, flicker, path_error
from scripts.reproduction.plan import FORMS, Budget, MethodRow
from scripts.reproduction.training import weights_of
from trainer.config import Config
from utils.config import load_config
from utils.distributed import resolve_device, resolve_dtype
from utils.files import atomic_path, atomic_write_text
from utils.previews import save_contact_sheet
from utils.seeds import derive_seed
from utils.shapes import Scene, ShapesConfig, held_out_scenes, measure, render_clips
from utils.side_files import read_json
from utils.tracking import progress

logger = logging.getLogger(__name__)
CONFIG = "configs/shapes/self_forcing_dmd.yaml"
BATCH = 12
SHEET_CLIPS, SHEET_FRAMES = 6, 12
REAL = "real-clips"


@dataclass(frozen=True)
class Measured:
    """The results of one training of a row, read from its file."""

    columns: dict[str, dict[str, list[float]]]
    """Length ("1x") -> column -> one value for each prompt, a mean over the seeds of its videos."""
    features: dict[str, Tensor]
    """Length -> the codec's features of the last training length of each video, [prompts, N, D]."""
    frames_per_second: float | None
    """Speed of one stream at the training length. None for real clips."""


def measured_file(folder: Path, row: str, seed: int) -> Path:
    """Return the file of a row and the seed of its training."""
    return folder / "measured" / f"{row}-{seed}.json"


def measure_method(row: MethodRow, budget: Budget, folder: Path, overrides: tuple[str, ...]) -> None:
    """Measure every training of a row that has no file yet."""
    for seed, training in zip(budget.seeds, row.trainings, strict=False):
        file = measured_file(folder, row.name, seed)
        if file.is_file():
            logger.info("%s, seed %d: measured already", row.name, seed)
            continue
        logger.info("%s, seed %d: measuring", row.name, seed)
        keys = [f"generator.weights={weights_of(folder, training)}", f"rollout.frames_per_chunk={FORMS[row.form]}"]
        studio = Studio.open([*keys, *row.overrides, *overrides])
        results = studio.measure(studio.generate, budget, row.lengths, sheet_file(folder, row.name, seed))
        _write(file, results, studio.frames_per_second(budget))


def measure_real(budget: Budget, folder: Path, overrides: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    """Measure real clips after the codec: what a perfect model would reach."""
    file = measured_file(folder, REAL, 0)
    if not file.is_file():
        logger.info("real clips: measuring")
        studio = Studio.open(list(overrides))
        _write(file, studio.measure(studio.render, budget, lengths, sheet_file(folder, REAL, 0)), None)


def sheet_file(folder: Path, row: str, seed: int) -> Path:
    """Return the file of the contact sheet of a row and the seed of its training."""
    return folder / "sheets" / f"{row}-{seed}.png"


@dataclass(frozen=True)
class Studio:
    """A loaded pipeline that makes and measures clips."""

    config: Config
    pipeline: TextToVideo
    device: torch.device

    @classmethod
    def open(cls, overrides: list[str]) -> Studio:
        """Load the pipeline of the Shapes world with these overrides."""
        config = load_config(Config, CONFIG, overrides)
        device = resolve_device(config.device)
        return cls(config, load_pipeline(config, device=device, dtype=resolve_dtype(config.dtype, device)), device)

    def scenes(self, budget: Budget) -> list[Scene]:
        """Return the held-out scenes of a budget, evenly spread."""
        scenes = held_out_scenes(self.config.data.shapes.world)
        return [scenes[index * len(scenes) // budget.prompts] for index in range(budget.prompts)]

    def generate(self, scenes: list[Scene], seed: int, length: int) -> Tensor:
        """Make one video a scene, ``length`` times as long as in training: [B F 3 H W]."""
        size, frames = (self.config.video.height, self.config.video.width), self.config.video.num_frames * length
        requests = [StreamRequest(scene.prompt, *size, seed=seed, num_frames=frames) for scene in scenes]
        return generate(self.pipeline, requests)

    def render(self, scenes: list[Scene], seed: int, length: int) -> Tensor:
        """Render one real clip a scene and pass it through the codec: [B F 3 H W]."""
        frames = self.pipeline.codec.num_frames(self.config.video.num_frames * length)
        drawn = torch.Generator().manual_seed(derive_seed(seed, *(scene.prompt for scene in scenes)))
        clips = render_clips(scenes, frames, drawn, self.config.data.shapes).to(self.device)
        return self.pipeline.codec.decode(self.pipeline.codec.encode(clips)).cpu()

    def frames_per_second(self, budget: Budget) -> float:
        """Return the frames/s of one stream at the training length, the better of two runs."""
        scene, best = self.scenes(budget)[:1], 0.0
        for _ in range(2):
            started = time.perf_counter()
            frames = self.generate(scene, 0, 1).shape[1]
            best = max(best, frames / (time.perf_counter() - started))
        return best

    def measure(
        self, make: Callable[[list[Scene], int, int], Tensor], budget: Budget, lengths: tuple[int, ...], sheet: Path
    ) -> Results:
        """Make the videos of a budget batch by batch, and measure their beginnings of every length."""
        scenes, results = self.scenes(budget), Results(lengths)
        starts = range(0, len(scenes), BATCH)
        for seed, start in progress(list(itertools.product(budget.video_seeds, starts)), "videos", unit="batch"):
            batch = scenes[start : start + BATCH]
            clips = make(batch, seed, max(lengths))
            if (seed, start) == (budget.video_seeds[0], 0):
                shown = slice(None, None, max(1, len(batch) // SHEET_CLIPS))
                prompts = [scene.prompt for scene in batch[shown]]
                save_contact_sheet(sheet, list(clips[shown]), prompts, columns_frames=SHEET_FRAMES)
            for index, (clip, scene) in enumerate(zip(clips, batch, strict=True)):
                for length in lengths:
                    results.add(length, start + index, *self._measure_clip(clip, scene, length))
        return results

    def _measure_clip(self, clip: Tensor, scene: Scene, length: int) -> tuple[dict[str, float], Tensor]:
        """Return all columns of the beginning of a clip, and the features of the last training length of it."""
        codec, frames = self.pipeline.codec, self.config.video.num_frames
        cut = clip[: codec.num_frames(frames * length)]
        features = codec_features(codec, cut[-codec.num_frames(frames) :].to(self.device))
        return clip_columns(cut, scene, self.config.data.shapes), features


class Results:
    """Values and features, collected clip by clip."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.values: dict[int, dict[int, list[dict[str, float]]]] = {length: {} for length in lengths}
        self.features: dict[int, dict[int, list[Tensor]]] = {length: {} for length in lengths}

    def add(self, length: int, prompt: int, columns: dict[str, float], features: Tensor) -> None:
        """Take the columns and the features of one clip of a prompt."""
        self.values[length].setdefault(prompt, []).append(columns)
        self.features[length].setdefault(prompt, []).append(features)

    def columns(self, length: int) -> dict[str, list[float]]:
        """Return one value for each prompt, a mean over its videos: column -> values."""
        prompts = list(self.values[length].values())
        return {name: [sum(clip[name] for clip in clips) / len(clips) for clips in prompts] for name in prompts[0][0]}

    def joined(self, length: int) -> Tensor:
        """Return the features [prompts N D]."""
        return torch.stack([torch.cat(clips) for clips in self.features[length].values()])


def clip_columns(clip: Tensor, scene: Scene, world: ShapesConfig) -> dict[str, float]:
    """Return all columns of one clip [F 3 H W]: the detector's, then the error of the path and the flicker."""
    measurement = measure(clip, scene, world)
    columns = {name: values.float().mean().nan_to_num(0.0).item() for name, values in measurement.columns.items()}
    return {
        **columns,
        "direction": float(measurement.direction),
        "smooth": float(measurement.smooth),
        "speed": float(measurement.right_speed),
        "all_right": float(measurement.all_right),
        "path_error": path_error(measurement, scene, world),
        "flicker": flicker(clip),
    }


def _write(file: Path, results: Results, speed: float | None) -> None:
    """Write the features, then the columns: the second file says that both are complete."""
    with atomic_path(file.with_suffix(".safetensors")) as path:
        save_file({f"{length}x": results.joined(length) for length in results.features}, path)
    columns = {f"{length}x": results.columns(length) for length in results.values}
    atomic_write_text(file, json.dumps({"frames_per_second": speed, "columns": columns}) + "\n")


def read_measured(file: Path) -> Measured:
    """Read the results of a row and a training."""
    values = read_json(file, dict)
    return Measured(values["columns"], load_file(file.with_suffix(".safetensors")), values["frames_per_second"])
