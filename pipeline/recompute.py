"""Encodes the context again for every chunk, as krea-ai/realtime-video does for its 14B model.

The first latent of a clip encodes one pixel frame, a later one several. If a context no longer contains the first frame
of the clip, its first latent is of a kind with which no clip begins. Here this latent is replaced by the encoding of
its last pixel frame. For the model, every chunk then continues a short clip.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VideoCodec


class ContextImages:
    """Decodes the latest frames of a video, and encodes the frame with which a context begins.

    Args:
        codec: decodes the finished chunks in order, and encodes single frames.
        longest: the number of latent frames of the longest context.
    """

    def __init__(self, codec: VideoCodec, longest: int) -> None:
        self.codec = codec
        self.kept = 1 + (longest - 1) * codec.temporal_scale
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new clip begins."""
        self.decoder = self.codec.streaming_decoder()
        self.frames: Tensor | None = None

    @torch.no_grad()
    def add(self, latents: Tensor) -> None:
        """Decode the next latents [B F C H W] of the video. Each must be given once, in order."""
        decoded = self.decoder.decode(latents)
        frames = decoded if self.frames is None else torch.cat([self.frames, decoded], dim=1)
        self.frames = frames[:, -self.kept :].clone()

    @torch.no_grad()
    def first(self, frames: int) -> Tensor:
        """Return the image latent [B 1 C H W] at the beginning of a context of the last ``frames`` latent frames."""
        place = 1 + (frames - 1) * self.codec.temporal_scale
        return self.codec.encode(self.frames[:, self.frames.shape[1] - place :][:, :1])
