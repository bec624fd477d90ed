"""Training data: prompts, prompt-image pairs, encoded videos, the Shapes world, and stored ODE trajectories.

A dataset is a list of items; a :class:`Stream` numbers its endless shuffled passes over them. Sample i of a stream is a
function of the seed and i alone, so any number of processes that share out the indices see the same samples.

Shapes: B batch, F latent frames (pixel frames, of ``frames``), C channels, H W height and width, S stored states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from model.codec import VideoCodec
from model.text_encoder import PromptCache
from pipeline.config import TextConfig, VideoConfig
from pipeline.loading import load_text_encoder
from utils.distributed import derive_seed, resolve_dtype
from utils.errors import UserError
from utils.images import load_image
from utils.prompts import read_image_prompts, read_prompts
from utils.shapes import Scene, ShapesConfig, render_clips, training_scenes
from utils.shards import Shards

CACHED_PROMPTS = 4096


class DataKind(Enum):
    """Where training data comes from."""

    shapes = "shapes"
    prompts = "prompts"
    images = "images"
    videos = "videos"


class Contents(Enum):
    """What an objective needs of a sample, besides its prompt."""

    prompts = "prompts"
    first_frames = "first frames"
    clips = "videos"


@dataclass
class DataConfig:
    """What is trained on."""

    kind: DataKind = DataKind.prompts
    """shapes: the Shapes world; prompts: a text file; images: prompt-image pairs; videos: encoded videos."""
    path: str | None = None
    """prompts: one a line; images: JSON lines {"image": ..., "prompt": ...}; videos: a folder of encode_videos.py."""
    switch_path: str | None = None
    """prompts: what line n of path changes to, on line n (self_forcing_continued); null changes to another of path."""
    embeddings: str | None = None
    """Folder of scripts/cache_embeddings.py, read in place of running the text encoder."""
    sample_prompts: str = "prompts/shapes.txt"
    """Prompts of the sample videos made during training."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """The Shapes world."""


Size = Annotated[int, Field(gt=0, le=2**20)]


class AboutVideos(TypedDict):
    """What all videos of a folder of encode_videos.py have in common."""

    num_frames: Size
    """Latent frames."""
    height: Size
    width: Size
    """Pixels."""
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AboutPairs(TypedDict):
    """What all trajectories of a folder of make_ode_pairs.py have in common."""

    timesteps: Annotated[list[Annotated[float, Field(ge=0, le=1000)]], Field(min_length=2)]
    causal: bool


class AboutEmbeddings(TypedDict):
    """What all embeddings of a folder of cache_embeddings.py have in common."""

    dim: Size
    text_len: Size


class Draw(NamedTuple):
    """One sample to be made: an item, and the seed of whatever is random about it."""

    item: int
    seed: int


@dataclass
class Samples:
    """A batch: prompts, and what else the dataset has."""

    prompts: list[str]
    second_prompts: list[str] | None = None
    """The prompts that they change to, if data.switch_path names them."""
    frames: Tensor | None = None
    """Pixels [B F 3 H W] in [-1, 1]."""
    latents: Tensor | None = None
    """Encoded already [B F C H W]."""
    states: Tensor | None = None
    """A teacher's trajectory from noise to clean [B S F C H W]."""

    def encode(self, codec: VideoCodec, device: torch.device) -> Tensor:
        """Latents [B F C H W] on ``device``."""
        return codec.encode(self.frames.to(device)) if self.latents is None else self.latents.to(device)


class Dataset(Protocol):
    """Items that samples are made of."""

    def __len__(self) -> int:
        """How many items there are."""
        ...

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """One sample a draw; the same draw gives the same sample."""
        ...


class Stream:
    """Endless samples of a dataset: every item comes once before any comes again, in a new order each time."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("an empty dataset cannot be drawn from")
        self.dataset = dataset
        self.seed = seed
        self.position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> range:
        """Global indices of the next ``count`` samples, those of all processes together."""
        self.position += count
        return range(self.position - count, self.position)

    def read(self, indices: Sequence[int]) -> Samples:
        """The samples of global indices, whatever was read before."""
        return self.dataset.samples([self._drawn(index) for index in indices])

    def next(self, count: int) -> Samples:
        """The next ``count`` samples, for a process that shares with no other."""
        return self.read(self.draw(count))

    def state_dict(self) -> dict[str, int]:
        """Position, and what the order of the items depends on."""
        return {"position": self.position, "seed": self.seed, "items": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            UserError: the dataset has another number of items now.
        """
        if state["items"] != len(self.dataset):
            raise UserError(
                f"the training data has {len(self.dataset)} items, but {state['items']} when the checkpoint was made; "
                "put them back, or start in another logdir"
            )
        self.position, self.seed = state["position"], state["seed"]
        self._order = (-1, [])

    def _drawn(self, index: int) -> Draw:
        epoch, place = divmod(index, len(self.dataset))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return Draw(self._order[1][place], derive_seed(self.seed, "sample", index))


class PromptData:
    """Prompts, and the prompts that they change to, if any.

    Raises:
        UserError: there are not as many of the second as of the first.
    """

    def __init__(self, prompts: Sequence[str], second_prompts: Sequence[str] | None = None) -> None:
        if second_prompts is not None and len(second_prompts) != len(prompts):
            raise UserError(
                f"data.switch_path has {len(second_prompts)} prompts and data.path has {len(prompts)}; "
                "line n of one changes to line n of the other, so give both the same number of lines"
            )
        self.prompts = prompts
        self.second_prompts = second_prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts."""
        second = self.second_prompts and [self.second_prompts[draw.item] for draw in draws]
        return Samples([self.prompts[draw.item] for draw in draws], second)


class ShapesData:
    """Clips of the training scenes of the Shapes world, rendered on the fly; ``num_frames`` pixel frames each."""

    def __init__(self, config: ShapesConfig, num_frames: int) -> None:
        self.config = config
        self.num_frames = num_frames
        self.scenes: list[Scene] = training_scenes()
        self.prompts = [scene.prompt for scene in self.scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts and frames; the seed decides where the object starts."""
        scenes = [self.scenes[draw.item] for draw in draws]
        clips = [
            render_clips([scene], self.num_frames, torch.Generator().manual_seed(draw.seed), self.config)
            for scene, draw in zip(scenes, draws, strict=True)
        ]
        return Samples([self.prompts[draw.item] for draw in draws], frames=torch.cat(clips))


class ImageData:
    """Prompt-image pairs; an image is a clip of one frame, scaled to cover the video's size."""

    def __init__(self, path: str | Path, video: VideoConfig) -> None:
        self.images, self.prompts = read_image_prompts(path)
        self.video = video

    def __len__(self) -> int:
        return len(self.images)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts and frames [B 1 3 H W]."""
        images = [load_image(self.images[draw.item], self.video.height, self.video.width) for draw in draws]
        return Samples([self.prompts[draw.item] for draw in draws], frames=torch.stack(images)[:, None])


class VideoData:
    """Videos that scripts/encode_videos.py has encoded, cut to their first ``num_frames`` latent frames.

    Raises:
        UserError: they are of another size, or shorter.
    """

    def __init__(self, folder: str | Path, video: VideoConfig, num_frames: int) -> None:
        remedy = "encode a folder of videos with scripts/encode_videos.py"
        self.shards = Shards(folder, key="data.path", remedy=remedy, about=AboutVideos)
        about = self.shards.about
        for name, wanted in (("height", video.height), ("width", video.width)):
            if about[name] != wanted:
                raise UserError(f"data.path={folder}: its videos have {name} {about[name]}, but video.{name}={wanted}")
        if about["num_frames"] < num_frames:
            raise UserError(
                f"data.path={folder}: its videos have {about['num_frames']} latent frames; {num_frames} are needed"
            )
        self.num_frames = num_frames
        self.prompts = self.shards.prompts()
        self.shape = about["num_frames"], *self.shards.shape(0, "latents")[1:]

    def __len__(self) -> int:
        return len(self.shards)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts and latents [B F C H W]."""
        latents = [self.shards.read(draw.item, "latents", shape=self.shape) for draw in draws]
        latents = torch.stack([item[: self.num_frames].float() for item in latents])
        return Samples([self.prompts[draw.item] for draw in draws], latents=latents)


class ODEData:
    """Trajectories that scripts/make_ode_pairs.py has stored: ``states``, and ``latents`` where the context was given.

    Raises:
        UserError: the folder holds none.
    """

    def __init__(self, folder: str | Path) -> None:
        remedy = "make pairs with scripts/make_ode_pairs.py"
        self.shards = Shards(folder, key="ode.pairs", remedy=remedy, about=AboutPairs)
        self.timesteps: list[float] = self.shards.about["timesteps"]
        """Of the S states; the last is 0."""
        self.causal: bool = self.shards.about["causal"]
        """Whether every chunk was solved after the clean chunks before it, which are the samples' ``latents``."""
        self.prompts = self.shards.prompts()
        self.shape = len(self.timesteps), *self.shards.shape(0, "states")[1:]
        self.num_frames: int = self.shape[1]
        """Latent frames of every trajectory."""

    def __len__(self) -> int:
        return len(self.shards)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Prompts, states [B S F C H W], and latents [B F C H W] if causal."""
        states = self._stacked("states", draws, self.shape)
        clean = self._stacked("clean", draws, self.shape[1:]) if self.causal else None
        return Samples([self.prompts[draw.item] for draw in draws], states=states, latents=clean)

    def _stacked(self, name: str, draws: Sequence[Draw], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([self.shards.read(draw.item, name, shape=shape).float() for draw in draws])


class StoredEmbeddings:
    """Prompt embeddings that scripts/cache_embeddings.py has stored, in place of a text encoder.

    Raises:
        UserError: the folder holds none.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        remedy = "fill it with scripts/cache_embeddings.py"
        self.shards = Shards(folder, key="data.embeddings", remedy=remedy, about=AboutEmbeddings)
        self.places = {prompt: index for index, prompt in enumerate(self.shards.prompts())}
        self.dim: int = self.shards.about["dim"]
        """Embedding channels D."""
        self.text_len: int = self.shards.about["text_len"]
        """Tokens L per prompt."""
        self.device = torch.device(device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B L D] float32 of B prompts, zero past each prompt's own length.

        Raises:
            UserError: a prompt is not stored.
        """
        embeds = torch.zeros(len(prompts), self.text_len, self.dim)
        for row, prompt in zip(embeds, prompts, strict=True):
            if prompt not in self.places:
                raise UserError(f"{self.shards.source}: holds no embedding of {prompt!r}; {self.shards.remedy}")
            place = self.places[prompt]
            length = min(self.text_len, self.shards.shape(place, "embeds")[0])
            row[:length] = self.shards.read(place, "embeds", shape=(length, self.dim))
        return embeds.to(self.device)


def training_data(
    config: DataConfig, contents: Contents, *, seed: int, video: VideoConfig, codec: VideoCodec
) -> Stream:
    """What an objective that needs ``contents`` trains on, from ``seed``.

    Raises:
        UserError: ``data.kind`` has no such contents, or ``data.path`` is missing or holds something else.
    """
    if contents not in CONTENTS[config.kind]:
        kinds = " or ".join(kind.value for kind, held in CONTENTS.items() if contents in held)
        raise UserError(f"data.kind={config.kind.value} has no {contents.value} to train on; use data.kind={kinds}")
    if config.switch_path is not None and config.kind is not DataKind.prompts:
        raise UserError(f"data.switch_path={config.switch_path} needs data.kind=prompts, not {config.kind.value}")
    if contents is Contents.prompts:
        second = None if config.switch_path is None else read_prompts(config.switch_path)
        return Stream(PromptData(all_prompts(config, video), second), seed)
    frames = video.num_frames if contents is Contents.clips else 1
    match config.kind:
        case DataKind.shapes:
            data = ShapesData(config.shapes, codec.num_frames(frames))
        case DataKind.images:
            data = ImageData(_path(config), video)
        case DataKind.videos:
            data = VideoData(_path(config), video, frames)
    return Stream(data, seed)


def all_prompts(config: DataConfig, video: VideoConfig) -> list[str]:
    """Every prompt of the training data, in order.

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
    """What turns prompts into embeddings [B L D] float32: stored ones if there are any, else the frozen text encoder.

    On a GPU the encoder computes in bfloat16, as Wan's own does: 11.4 GB for UMT5-XXL on every process, not 22.7.
    """
    if config.embeddings is not None:
        return StoredEmbeddings(config.embeddings, device)
    encoder = load_text_encoder(text, device=device, dtype=resolve_dtype("auto", device))
    return PromptCache(encoder, CACHED_PROMPTS, device=device, dtype=torch.float32)
