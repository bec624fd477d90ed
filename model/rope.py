"""Rotary position embedding over three axes (time, height, width), made on the CPU for any frame index."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of the ``head_dim / 2`` rotated pairs belong to time, height and width."""
    spatial = head_dim // 2 // 3
    return head_dim // 2 - 2 * spatial, spatial, spatial


def _angles(positions: Tensor, pairs: int) -> Tensor:
    frequencies = BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return positions.double()[:, None] * frequencies


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table kept from generation must also serve training
def rotary_table(
    frames: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token of the given frames.

    Args:
        frames: absolute latent frame index of each frame, in sequence order; any size, repeats allowed.
        height, width: tokens per frame on each axis.

    Returns:
        cos, sin: [F T 1 D/2] float32 on ``device`` with T = height * width, computed in float64 on the CPU.
    """
    time_pairs, height_pairs, width_pairs = axis_pairs(head_dim)
    time = _angles(torch.tensor(frames), time_pairs)[:, None, None].expand(-1, height, width, -1)
    rows = _angles(torch.arange(height), height_pairs)[None, :, None].expand(len(frames), -1, width, -1)
    columns = _angles(torch.arange(width), width_pairs)[None, None, :].expand(len(frames), height, -1, -1)
    angles = torch.cat([time, rows, columns], dim=-1).flatten(1, 2).unsqueeze(2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate interleaved pairs of x [B F T N D] by ``table`` (see :func:`rotary_table`), in float32."""
    cos, sin = table
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
