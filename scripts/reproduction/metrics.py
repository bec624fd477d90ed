"""Measures of the reproduction beside the detector's: error of the path, flicker, and the Frechet distance.

Legend: F pixel frames, H W pixels, f latent frames, C latent channels, N samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VideoCodec
from utils.shapes import Measurement, Scene, ShapesConfig, positions

FIRST_FRAMES = 5  # frames from which the start of a path is taken
STILL = 0.3  # share of pixels, those that change most, that may belong to moving objects
LEVELS = 127.5  # 8-bit levels in a difference of 1


def path_error(measurement: Measurement, scene: Scene, config: ShapesConfig) -> float:
    """Return the mean distance in pixels between an object and where exact physics takes it; lower is better.

    The exact path starts where the object is in the first frames. A frame in which it is missing counts as half the
    side of the frame, unless another object hides it.
    """
    errors = []
    for thing, track in zip(scene.things, measurement.paths, strict=True):
        known = ~track[:FIRST_FRAMES].isnan().any(1)
        exact = torch.full_like(track, torch.nan)
        if known.any():
            still = positions([thing], torch.full((1, 2), config.resolution / 2), FIRST_FRAMES, config)[0]
            start = (track[:FIRST_FRAMES] - (still - still[0]))[known].mean(0)
            exact = positions([thing], start[None], len(track), config)[0]
        error = (track - exact).norm(dim=1).nan_to_num(config.resolution / 2)
        errors.append(error[measurement.judged_frames])
    return torch.stack(errors).mean().item()


def flicker(clip: Tensor) -> float:
    """Return how much the still part of a clip [F 3 H W] changes between frames: mean 8-bit levels, lower is better.

    The still part consists of the pixels that change least, all but a share of STILL in each pair of frames.
    """
    change = clip.diff(dim=0).abs().mean(1).flatten(1)
    kept = max(1, round(change.shape[1] * (1 - STILL)))
    return LEVELS * change.sort(dim=1).values[:, :kept].mean().item()


@torch.no_grad()
def codec_features(codec: VideoCodec, clip: Tensor) -> Tensor:
    """Return the mean and deviation of each latent channel over each latent frame of a clip [F 3 H W]: [f 2C]."""
    latents = codec.encode(clip[None])[0].float().flatten(2)
    return torch.cat([latents.mean(-1), latents.std(-1)], dim=1).cpu()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two Gaussians fitted to features [N D] (arXiv 1706.08500, Eq. 6); lower is better.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``
    """
    first, second = first.double(), second.double()
    root = _root(first.T.cov())
    overlap = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp_min(0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return (means + first.T.cov().trace() + second.T.cov().trace() - 2 * overlap).clamp_min(0).item()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
