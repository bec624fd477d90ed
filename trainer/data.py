"""Training data: clips of the Shapes world rendered on the fly, and prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text
from utils.prompts import read_prompts
from utils.shapes import Scene, ShapesConfig, render_clips, training_scenes


class DataKind(Enum):
    """Where training data comes from."""

    shapes = "shapes"
    prompts = "prompts"


@dataclass
class DataConfig:
    """What is trained on."""

    kind: DataKind = DataKind.prompts
    """shapes: clips and prompts of the Shapes world; prompts: a text file, one prompt a line."""
    path: str | None = None
    """The prompt file."""
    sample_prompts: str = "prompts/shapes.txt"
    """Prompts of the sample videos made during training."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """The Shapes world."""


class Clips(NamedTuple):
    """Pixels [B F 3 H W] in [-1, 1] and their prompts."""

    frames: Tensor
    prompts: list[str]


class ShapesClips:
    """Endless batches of training clips; every training scene is seen once before any is seen again."""

    def __init__(self, config: ShapesConfig, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator
        self.prompts = Deck(training_scenes(), generator)

    def next(self, batch: int, num_frames: int) -> Clips:
        """The next clips of ``num_frames`` pixel frames."""
        scenes: list[Scene] = self.prompts.next(batch)
        return Clips(render_clips(scenes, num_frames, self.generator, self.config), [scene.prompt for scene in scenes])


class Deck:
    """Endless draws from a list, reshuffled each time it has been dealt out."""

    def __init__(self, items: list, generator: torch.Generator) -> None:
        if not items:
            raise ValueError("an empty list cannot be drawn from")
        self.items = items
        self.generator = generator
        self.order: list[int] = []

    def next(self, count: int) -> list:
        """The next ``count`` items."""
        while len(self.order) < count:
            self.order += torch.randperm(len(self.items), generator=self.generator).tolist()
        drawn, self.order = self.order[:count], self.order[count:]
        return [self.items[index] for index in drawn]


def training_clips(config: DataConfig, generator: torch.Generator) -> ShapesClips:
    """The clips a video objective trains on.

    Raises:
        UserError: ``data.kind`` has no videos.
    """
    if config.kind is not DataKind.shapes:
        raise UserError(f"data.kind={config.kind.value} has no videos to train on; use data.kind=shapes")
    return ShapesClips(config.shapes, generator)


def training_prompts(config: DataConfig, generator: torch.Generator) -> Deck:
    """The prompts a text-only objective draws from.

    Raises:
        UserError: ``data.kind`` is prompts and ``data.path`` is not a file with prompts.
    """
    if config.kind is DataKind.shapes:
        return Deck([scene.prompt for scene in training_scenes()], generator)
    if config.path is None:
        raise UserError("data.path is null; name a text file with one prompt a line")
    return Deck(read_prompts(config.path), generator)


class ODEPairs(NamedTuple):
    """Trajectories [N S F C H W] from noise to clean, the timesteps of their S states, and their N prompts."""

    trajectories: Tensor
    timesteps: list[float]
    prompts: list[str]


def write_ode_pairs(folder: str | Path, pairs: ODEPairs) -> None:
    """Write pairs.safetensors and pairs.json, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "pairs.safetensors") as path:
        save_file({"trajectories": pairs.trajectories.contiguous()}, path)
    atomic_write_text(folder / "pairs.json", json.dumps({"timesteps": pairs.timesteps, "prompts": pairs.prompts}))


def read_ode_pairs(folder: str | Path) -> ODEPairs:
    """Read what :func:`write_ode_pairs` wrote.

    Raises:
        UserError: there is nothing to read.
    """
    folder = Path(folder)
    if not (folder / "pairs.json").is_file():
        raise UserError(f"ode.pairs={folder}: holds no pairs; make them with scripts/make_ode_pairs.py")
    listing = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    return ODEPairs(load_file(folder / "pairs.safetensors")["trajectories"], **listing)
