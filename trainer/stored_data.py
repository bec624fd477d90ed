"""Datasets that a script has stored in a folder of shards: encoded videos, ODE trajectories, prompt embeddings.

Shapes: B batch, F latent frames, C channels, H W height and width, S stored states, L tokens, D embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from pipeline.config import VideoConfig
from trainer.draws import Draw, Samples
from utils.errors import UserError
from utils.shards import Shards

Size = Annotated[int, Field(gt=0, le=2**20)]


class AboutVideos(TypedDict):
    """The common properties of all videos in a folder of encode_videos.py."""

    num_frames: Size
    """Latent frames."""
    height: Size
    width: Size
    """Pixels."""
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AboutPairs(TypedDict):
    """The common properties of all trajectories in a folder of make_ode_pairs.py."""

    timesteps: Annotated[list[Annotated[float, Field(ge=0, le=1000)]], Field(min_length=2)]
    causal: bool


class AboutEmbeddings(TypedDict):
    """The common properties of all embeddings in a folder of cache_embeddings.py."""

    dim: Size
    text_len: Size


class VideoData:
    """Videos that scripts/encode_videos.py has encoded, cut to their first ``num_frames`` latent frames.

    Raises:
        UserError: the videos have another size, or are too short.
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
        """Return prompts and latents [B F C H W]."""
        latents = [self.shards.read(draw.item, "latents", shape=self.shape) for draw in draws]
        latents = torch.stack([item[: self.num_frames].float() for item in latents])
        return Samples([self.prompts[draw.item] for draw in draws], latents=latents)


class ODEData:
    """Trajectories that scripts/make_ode_pairs.py has stored: ``states``, and ``latents`` if the context was given.

    Raises:
        UserError: the folder contains none.
    """

    def __init__(self, folder: str | Path) -> None:
        remedy = "make pairs with scripts/make_ode_pairs.py"
        self.shards = Shards(folder, key="ode.pairs", remedy=remedy, about=AboutPairs)
        self.timesteps: list[float] = self.shards.about["timesteps"]
        """The timesteps of the S states. The last is 0."""
        self.causal: bool = self.shards.about["causal"]
        """True if every chunk was solved after the earlier clean chunks, which are the ``latents`` of the samples."""
        self.prompts = self.shards.prompts()
        self.shape = len(self.timesteps), *self.shards.shape(0, "states")[1:]
        self.num_frames: int = self.shape[1]
        """The number of latent frames of every trajectory."""

    def __len__(self) -> int:
        return len(self.shards)

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Return prompts, states [B S F C H W], and latents [B F C H W] if causal."""
        states = self._stacked("states", draws, self.shape)
        clean = self._stacked("clean", draws, self.shape[1:]) if self.causal else None
        return Samples([self.prompts[draw.item] for draw in draws], states=states, latents=clean)

    def _stacked(self, name: str, draws: Sequence[Draw], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([self.shards.read(draw.item, name, shape=shape).float() for draw in draws])


class StoredEmbeddings:
    """Prompt embeddings that scripts/cache_embeddings.py has stored. They replace a text encoder.

    Raises:
        UserError: the folder contains none.
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
        """Return the embeddings [B L D] float32 of B prompts, with zeros after the end of each prompt.

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
