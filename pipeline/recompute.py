"""A context that is encoded anew for every chunk, as krea-ai/realtime-video does it for its 14B model.

The first latent of a clip encodes one pixel frame, a later one several. So a context that no longer contains the first
frame of the clip begins with a latent that no clip begins with. Here its first latent is replaced by the encoding of
the pixel frame that it ends with: to the model, every chunk continues a short clip.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VideoCodec


class ContextImages:
    """The latest decoded frames of a video, and the encoding of the one that a context begins with.

    Args:
        codec: decodes the finished chunks, one after the other, and encodes single frames.
        longest: latent frames of the longest context.
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
        """Decode the next latents [B F C H W] of the video; each must come once, in order."""
        decoded = self.decoder.decode(latents)
        frames = decoded if self.frames is None else torch.cat([self.frames, decoded], dim=1)
        self.frames = frames[:, -self.kept :].clone()

    @torch.no_grad()
    def first(self, frames: int) -> Tensor:
        """Return the image latent [B 1 C H W] that a context of the last ``frames`` latent frames begins with."""
        place = 1 + (frames - 1) * self.codec.temporal_scale
        return self.codec.encode(self.frames[:, self.frames.shape[1] - place :][:, :1])
