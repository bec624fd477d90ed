"""The records that a dataset takes and returns: draws and samples.

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
    """One sample to be made: an item, and a seed for everything random in it."""

    item: int
    seed: int


@dataclass
class Samples:
    """A batch: prompts, and the other contents of the dataset."""

    prompts: list[str]
    second_prompts: list[str] | None = None
    """The second prompts, if data.switch_path names a file of them."""
    frames: Tensor | None = None
    """Pixels [B F 3 H W] in [-1, 1]."""
    latents: Tensor | None = None
    """Stored latents [B F C H W]."""
    states: Tensor | None = None
    """A teacher's trajectory from noise to clean [B S F C H W]."""

    def encode(self, codec: VideoCodec, device: torch.device) -> Tensor:
        """Return the latents [B F C H W] on ``device``."""
        return codec.encode(self.frames.to(device)) if self.latents is None else self.latents.to(device)


class Dataset(Protocol):
    """A list of items from which samples are made."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def samples(self, draws: Sequence[Draw]) -> Samples:
        """Return one sample for each draw. The same draw gives the same sample."""
        ...
