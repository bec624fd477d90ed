"""The source of a video-to-video stream: its frames are collected and encoded chunk by chunk.

Shapes: F pixel frames, H W pixel size, f latent frames of a chunk, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SourceFrames:
    """Takes frames [F 3 H W] in pieces of any length, and returns them in chunks."""

    def __init__(self, pieces: Iterable[Tensor | None]) -> None:
        self._pieces = iter(pieces)
        self._frames: Tensor | None = None
        self._ended = False

    def fill(self, count: int) -> bool:
        """Take pieces until ``count`` frames are there. True if they are, or if the source has ended."""
        while not self._ended and (self._frames is None or len(self._frames) < count):
            try:
                piece = next(self._pieces)
            except StopIteration:
                self._ended = True
                break
            if piece is None:
                return False
            self._frames = piece if self._frames is None else torch.cat([self._frames, piece])
        return True

    def take(self, count: int) -> Tensor | None:
        """Return the next frames [count 3 H W]. Copies of the last frame fill the last chunk. None at the end."""
        self.fill(count)
        if self._frames is None or len(self._frames) == 0:
            return None
        frames, self._frames = self._frames[:count], self._frames[count:]
        return torch.cat([frames, frames[-1:].expand(count - len(frames), -1, -1, -1)])


class SourceEncoder:
    """Encodes the chunks of a source in order."""

    def __init__(self, encode: Callable[[Tensor], Tensor], temporal_scale: int) -> None:
        """
        Args:
            encode: turns frames [1 F 3 H W] into latents [1 f C h w].
            temporal_scale: pixel frames of every latent frame except the first.
        """
        self._encode, self._kept = encode, 1 + temporal_scale
        self._past: Tensor | None = None

    def __call__(self, frames: Tensor, latent_frames: int, *, begins: bool) -> Tensor:
        """Return the latents [1 f C h w] of the next chunk [F 3 H W].

        The first latent frame of an encoding codes only one pixel frame. A chunk that continues a clip is therefore
        encoded together with the last frames before it. The latents of those frames are dropped.

        Args:
            begins: True if a clip begins with this chunk.
        """
        past = None if begins else self._past
        self._past = frames[-self._kept :]
        if past is not None:
            frames = torch.cat([past, frames])
        return self._encode(frames[None])[:, -latent_frames:]
