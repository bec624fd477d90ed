"""Scores of rollouts longer than the clips the score networks know (Self Forcing, Section 3.4; LongLive, 2509.22622).

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VideoCodec

DECODED_AT_ONCE = 4


def score_window(latents: Tensor, num_frames: int, codec: VideoCodec) -> Tensor:
    """The last ``num_frames`` frames of a rollout [B F C H W] as a clip that begins with them.

    A clip's first latent stands for one pixel frame, a later one for several: so the window's first latent is replaced
    by the encoding of the last pixel frame it decodes to, without gradient; the caller leaves it out of the loss. A
    rollout of just ``num_frames`` frames is such a clip already.
    """
    begin = latents.shape[1] - num_frames
    if begin == 0:
        return latents
    with torch.no_grad():
        decoder = codec.streaming_decoder()
        for part in latents[:, : begin + 1].detach().split(DECODED_AT_ONCE, dim=1):
            frames = decoder.decode(part)
        first = codec.encode(frames[:, -1:]).to(latents)
    return torch.cat([first, latents[:, begin + 1 :]], dim=1)


def later_frames(num_frames: int, device: torch.device) -> Tensor:
    """Which frames of a clip whose first latent is given count in a loss: all but that one, [F] bool."""
    return torch.arange(num_frames, device=device) > 0


def visible_history(latents: Tensor, following: int, window: int | None, sink: int) -> Tensor:
    """The frames of a rollout [B F C H W] that a chunk of ``following`` more frames would see: sink and latest ones."""
    if window is None or latents.shape[1] + following <= window:
        return latents
    latest = window - sink - following
    return torch.cat([latents[:, :sink], latents[:, latents.shape[1] - latest :]], dim=1)


def draw_length(shortest: int, longest: int, multiple: int, generator: torch.Generator) -> int:
    """A rollout length: shortest, shortest + multiple, ..., at most longest, each as likely."""
    choices = range(shortest, longest + 1, multiple)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def draw_switch(windows: int, probability: float, generator: torch.Generator) -> int:
    """Before which window of a rollout the prompt changes, 1 ... windows - 1, each as likely; ``windows`` is never."""
    happens = float(torch.rand((), generator=generator)) < probability
    place = int(torch.randint(1, max(2, windows), (), generator=generator))
    return place if happens and windows > 1 else windows
