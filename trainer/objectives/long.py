"""Scores of rollouts longer than the clips the score networks know (Self Forcing, Section 3.4; LongLive, 2509.22622).

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VideoCodec

DECODED_AT_ONCE = 4


def score_window(latents: Tensor, num_frames: int, codec: VideoCodec) -> Tensor:
    """Return the last ``num_frames`` frames of a rollout [B F C H W] as a clip that begins with them.

    The first latent of a clip encodes one pixel frame, a later one several. So the window's first latent is replaced
    by the encoding of the last pixel frame that it decodes to, without gradient. The caller leaves its whole chunk out
    of the loss. A rollout of exactly ``num_frames`` frames is returned unchanged.
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


def later_frames(num_frames: int, device: torch.device, *, uncounted: int = 1) -> Tensor:
    """Return which frames of a clip count in a loss, [F] bool: all but the first ``uncounted`` ones."""
    return torch.arange(num_frames, device=device) >= uncounted


def visible_history(latents: Tensor, following: int, window: int | None, sink: int) -> Tensor:
    """Return the frames of a rollout [B F C H W] that a chunk of ``following`` more frames sees: sink and latest."""
    if window is None or latents.shape[1] + following <= window:
        return latents
    latest = window - sink - following
    return torch.cat([latents[:, :sink], latents[:, latents.shape[1] - latest :]], dim=1)


def draw_length(shortest: int, longest: int, multiple: int, generator: torch.Generator) -> int:
    """Draw a rollout length: shortest, shortest + multiple, ..., at most longest, each with the same probability."""
    choices = range(shortest, longest + 1, multiple)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def draw_switch(windows: int, probability: float, generator: torch.Generator, *, last: int | None = None) -> int:
    """Draw the window of a rollout before which the prompt changes: 1 ... last, each with the same probability.

    Args:
        windows: windows of a rollout.
        probability: how often there is a change at all, in [0, 1].
        last: the last window that may begin with a change; None is ``windows - 1``.

    Returns:
        the window, counted from 0; ``windows`` if the prompt does not change.
    """
    last = windows - 1 if last is None else min(last, windows - 1)
    happens = float(torch.rand((), generator=generator)) < probability
    place = int(torch.randint(1, max(2, last + 1), (), generator=generator))
    return place if happens and last > 0 else windows
