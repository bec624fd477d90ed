"""Rotary position embedding over three axes (time, height, width). Tables are made on the CPU, for any frame index.

Shapes: B batch, F frames, T tokens a frame, N heads, D head dim. A table holds cosine and sine in its last dimension.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from utils.transfer import send

BASE = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many of the ``head_dim / 2`` rotated pairs belong to time, height and width."""
    spatial = head_dim // 2 // 3
    return head_dim // 2 - 2 * spatial, spatial, spatial


def _table(positions: Tensor, pairs: int) -> Tensor:
    """Return the cosines and sines [... pairs 2] of positions [...], computed in float64."""
    frequencies = BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = positions.double()[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table kept from generation must also serve training
def _spatial_table(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Return the part of the table for height and width, for every token of a frame: [T P 2]."""
    _, height_pairs, width_pairs = axis_pairs(head_dim)
    rows = _table(torch.arange(height), height_pairs)[:, None].expand(-1, width, -1, -1)
    columns = _table(torch.arange(width), width_pairs)[None].expand(height, -1, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_table(frames: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Return the cosines and sines for every token of the given frames.

    Args:
        frames: absolute latent frame index of each frame, in sequence order. Indices may be large and may repeat.
        height, width: tokens per frame on each axis.

    Returns:
        [F T 1 D/2 2] float32 on ``device`` with T = height * width, computed in float64 on the CPU.
    """
    spatial = _spatial_table(height, width, head_dim, device).expand(len(frames), -1, -1, -1)
    time = send(_table(torch.tensor(frames), axis_pairs(head_dim)[0]), device)
    return torch.cat([time[:, None].expand(-1, height * width, -1, -1), spatial], dim=2).unsqueeze(2)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def shift_table(frames: int, head_dim: int, device: torch.device) -> Tensor:
    """Return the table [1 1 1 D/2 2] that moves already rotated keys by ``frames`` latent frames."""
    time_pairs, height_pairs, width_pairs = axis_pairs(head_dim)
    moved, still = _table(torch.tensor(frames), time_pairs), _table(torch.tensor(0), height_pairs + width_pairs)
    return send(torch.cat([moved, still])[None, None, None], device)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B F T N D] by ``table`` (see :func:`rotary_table`), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it does not fuse complex numbers, and writes what is stacked to memory
        cos, sin = table.split(1, dim=-1)
        sign = torch.arange(-1, 2, 2, device=x.device)  # (real, imaginary) i = (-imaginary, real)
        rotated = pairs * cos + pairs.flip(-1) * (sin * sign)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)
