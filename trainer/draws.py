"""What a dataset gives: draws and samples.

Shapes: B batch, F latent frames (pixel frames, of ``frames``), C channels, H W height and width, S stored states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.codec import VideoCodec


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
