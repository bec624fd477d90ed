"""Measures drift and flicker without a model: how the end of a video differs from its beginning.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
MEASURES = ("sharpness", "brightness", "colourfulness", "motion", "flicker")


@dataclass(frozen=True)
class Drift:
    """Five figures of the first and the last seconds of a video."""

    first: dict[str, float]
    last: dict[str, float]

    @property
    def change(self) -> dict[str, float]:
        """Return the last figures divided by the first. 1 is no drift. NaN if the first is 0."""
        return {name: self.last[name] / self.first[name] if self.first[name] else float("nan") for name in MEASURES}


def measure_drift(frames: Tensor, fps: float, *, seconds: float = 2.0) -> Drift:
    """Compare the first and the last seconds of a video, uint8 [F H W 3]. A shorter video is compared by halves."""
    count = max(3, min(round(seconds * fps), len(frames) // 2))
    return Drift(frame_figures(frames[:count]), frame_figures(frames[-count:]))


def frame_figures(frames: Tensor) -> dict[str, float]:
    """Return the figures of at least three frames, uint8 [F H W 3].

    sharpness: mean absolute Laplacian of the luma. brightness: mean luma. colourfulness: mean distance of the channels
    from the luma. motion: mean absolute change from frame to frame. flicker: mean absolute second difference in time.
    It is small for steady motion. All are in units of the 8-bit scale.
    """
    pixels = frames.float()
    luma = pixels @ torch.tensor(LUMA)
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(luma[:, None], laplacian[None, None])
    return {
        "sharpness": edges.abs().mean().item(),
        "brightness": luma.mean().item(),
        "colourfulness": (pixels - luma[..., None]).abs().mean().item(),
        "motion": luma.diff(dim=0).abs().mean().item(),
        "flicker": luma.mean((1, 2)).diff(n=2).abs().mean().item(),
    }


def summarise_drift(drifts: Sequence[Drift]) -> dict[str, dict[str, float]]:
    """Summarise videos: for each measure its mean at the beginning and at the end, and the median of the ratios."""
    return {
        name: {
            "first": _mean(drift.first[name] for drift in drifts),
            "last": _mean(drift.last[name] for drift in drifts),
            "change": torch.tensor([drift.change[name] for drift in drifts]).nanmedian().item(),
        }
        for name in MEASURES
    }


def _mean(values: Iterable[float]) -> float:
    return torch.tensor(list(values)).mean().item()
