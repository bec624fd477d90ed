"""Training data: prompts, prompt-image pairs, encoded videos, the Shapes world, and stored ODE trajectories.

A dataset is a list of items. A :class:`TrainingOrder` numbers the samples of endless shuffled passes over them. Sample
i depends only on the seed and on i, so any number of processes that divide the indices see the same samples.

Shapes: B batch, F latent frames (pixel frames, of ``frames``), C channels, H W height and width, S stored states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch

from model.codec import VideoCodec
from model.prompt_cache import PromptCache
from pipeline.config import TextConfig, VideoConfig
from pipeline.loading import load_text_encoder
from trainer.draws import Dataset, Draw, Samples
from trainer.stored_data import StoredEmbeddings, VideoData
from utils.distributed import resolve_dtype
from utils.errors import UserError
from utils.images import load_image
from utils.prompts import pair_prompts, read_image_prompts, read_prompt_lines, read_prompts
from utils.seeds import derive_seed, random_stream
from utils.shapes import Scene, ShapesConfig, render_clips, training_scenes

CACHED_PROMPTS = 4096


class DataKind(Enum):
    """Where training data comes from."""

    shapes = "shapes"
    prompts = "prompts"
    images = "images"
    videos = "videos"


class Contents(Enum):
    """What an objective needs from a sample, in addition to its prompt."""

    prompts = "prompts"
    first_frames = "first frames"
    clips = "videos"


@dataclass
class DataConfig:
    """The training data."""

    kind: DataKind = DataKind.prompts
    """shapes: the Shapes world; prompts: a text file; images: prompt-image pairs; videos: encoded videos."""
    path: str | None = None
    """prompts: one a line; images: JSON lines {"image": ..., "prompt": ...}; videos: a folder of encode_videos.py."""
    switch_path: str | None = None
    """prompts: a file whose line n is the second prompt for line n of path (self_forcing_continued). null takes another
    prompt of path."""
    embeddings: str | None = None
    """Folder of scripts/cache_embeddings.py. It is read instead of running the text encoder."""
    sample_prompts: str = "prompts/shapes.txt"
    """Prompts of the sample videos made during training."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """The Shapes world."""


class TrainingOrder:
    """Endless samples of a dataset: every item comes once before any comes again, in a new order each time."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("an empty dataset cannot be drawn from")
        self.dataset = dataset
        self.seed = seed
        self.position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> range:
        """Return the global indices of the next ``count`` samples of all processes together."""
        self.position += count
        return range(self.position - count, self.position)

    def read(self, indices: Sequence[int]) -> Samples:
        """Return the samples of global indices. They do not depend on earlier reads."""
        return self.dataset.samples([self._drawn(index) for index in indices])

    def next(self, count: int) -> Samples:
        """Return the next ``count`` samples, for a process that does not share the data with others."""
        return self.read(self.draw(count))

    def state_dict(self) -> dict[str, int]:
        """Return the position and everything that the order of the items depends on."""
        return {"position": self.position, "seed": self.seed, "items": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position at which :meth:`state_dict` was called.

        Raises:
            UserError: the dataset has another number of items now.
        """
        if state["items"] != len(self.dataset):
            raise UserError(
                f"the training data has {len(self.dataset)} items, but had {state['items']} when the checkpoint was "
                "made; put them back, or start in another logdir"
            )
        self.position, self.seed = state["position"], state["seed"]
        self._order = (-1, [])

    def _drawn(self, index: int) -> Draw:
        epoch, place = divmod(index, len(self.dataset))
        if self._order[0] != epoch:
            generator = random_stream(self.seed, "epoch", epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return Draw(self._order[1][place], derive_seed(self.seed, "sample", index))


class PromptData:
    """Prompts, and for each its second prompt, if there are any."""

    def __init__(self, prompts: Sequence[str], second_prompts: Sequence[str] | None = None) -> None:
        self.prompts = prompts
        self.second_prompts = second_prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts."""
        second = self.second_prompts and [self.second_prompts[draw.item] for draw in draws]
        return Samples([self.prompts[draw.item] for draw in draws], second)


class ShapesData:
    """Clips of the training scenes of the Shapes world, rendered when read, with ``num_frames`` pixel frames."""

    def __init__(self, config: ShapesConfig, num_frames: int) -> None:
        self.config = config
        self.num_frames = num_frames
        self.scenes: list[Scene] = training_scenes(config.world)
        self.prompts = [scene.prompt for scene in self.scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Return prompts and frames. The seed decides where the objects start, and their patterns."""
        scenes = [self.scenes[draw.item] for draw in draws]
        clips = [
            render_clips([scene], self.num_frames, torch.Generator().manual_seed(draw.seed), self.config)
            for scene, draw in zip(scenes, draws, strict=True)
        ]
        return Samples([self.prompts[draw.item] for draw in draws], frames=torch.cat(clips))


class ImageData:
    """Prompt-image pairs. An image is a clip of one frame, scaled to cover the video's size."""

    def __init__(self, path: str | Path, video: VideoConfig) -> None:
        self.images, self.prompts = read_image_prompts(path)
        self.video = video

    def __len__(self) -> int:
        return len(self.images)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Return prompts and frames [B 1 3 H W]."""
        images = [load_image(self.images[draw.item], self.video.height, self.video.width) for draw in draws]
        return Samples([self.prompts[draw.item] for draw in draws], frames=torch.stack(images)[:, None])


def training_data(
    config: DataConfig, contents: Contents, *, seed: int, video: VideoConfig, codec: VideoCodec
) -> TrainingOrder:
    """Return the training data of an objective that needs ``contents``, shuffled by ``seed``.

    Raises:
        UserError: ``data.kind`` has no such contents, or ``data.path`` is missing or holds something else.
    """
    if contents not in CONTENTS[config.kind]:
        kinds = " or ".join(kind.value for kind, held in CONTENTS.items() if contents in held)
        raise UserError(f"data.kind={config.kind.value} has no {contents.value} to train on; use data.kind={kinds}")
    if config.switch_path is not None and config.kind is not DataKind.prompts:
        raise UserError(f"data.switch_path={config.switch_path} needs data.kind=prompts, not {config.kind.value}")
    if contents is Contents.prompts:
        return TrainingOrder(PromptData(training_prompts(config, video), _second_prompts(config)), seed)
    frames = video.num_frames if contents is Contents.clips else 1
    match config.kind:
        case DataKind.shapes:
            data = ShapesData(config.shapes, codec.num_frames(frames))
        case DataKind.images:
            data = ImageData(_path(config), video)
        case DataKind.videos:
            data = VideoData(_path(config), video, frames)
    return TrainingOrder(data, seed)


def training_prompts(config: DataConfig, video: VideoConfig) -> list[str]:
    """Return every prompt of the training data, in order.

    Raises:
        UserError: ``data.path`` is missing or holds something else.
    """
    match config.kind:
        case DataKind.shapes:
            return ShapesData(config.shapes, 1).prompts
        case DataKind.prompts:
            return read_prompts(_path(config))
        case DataKind.images:
            return ImageData(_path(config), video).prompts
        case DataKind.videos:
            return VideoData(_path(config), video, 1).prompts


def _second_prompts(config: DataConfig) -> list[str] | None:
    """Return the prompts of ``data.switch_path``, in the order of the prompts of ``data.path``."""
    if config.switch_path is None:
        return None
    return pair_prompts(read_prompt_lines(_path(config)), _path(config), config.switch_path)


def _path(config: DataConfig) -> str:
    if config.path is None:
        raise UserError(f"data.path is null; name what data.kind={config.kind.value} reads")
    return config.path


CONTENTS = {
    DataKind.shapes: {Contents.prompts, Contents.first_frames, Contents.clips},
    DataKind.prompts: {Contents.prompts},
    DataKind.images: {Contents.prompts, Contents.first_frames},
    DataKind.videos: {Contents.prompts, Contents.first_frames, Contents.clips},
}


def text_source(config: DataConfig, text: TextConfig, device: torch.device) -> PromptCache | StoredEmbeddings:
    """Return the source of embeddings [B L D] float32: stored ones if there are any, else the frozen text encoder.

    On a GPU the encoder computes in bfloat16, as in Wan. UMT5-XXL then takes 11.4 GB on every process, not 22.7.
    """
    if config.embeddings is not None:
        return StoredEmbeddings(config.embeddings, device)
    encoder = load_text_encoder(text, device=device, dtype=resolve_dtype("auto", device))
    return PromptCache(encoder, CACHED_PROMPTS, device=device, dtype=torch.float32)
