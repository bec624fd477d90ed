"""Converts frames in memory: to bytes, to a larger size, to fit a size.

Shapes: F frames, H height, W width. Pixels are float in [-1, 1] as [F 3 H W] or uint8 in [0, 255] as [F H W 3].
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor


def to_uint8(frames: Tensor) -> Tensor:
    """Turn [F 3 H W] in [-1, 1] (clamped) into uint8 [F H W 3]; uint8 [F H W 3] passes unchanged."""
    if frames.ndim == 4 and frames.dtype == torch.uint8 and frames.shape[-1] == 3:
        return frames
    if frames.ndim != 4 or not frames.is_floating_point() or frames.shape[1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not float [F 3 H W] or uint8 [F H W 3]")
    levels = ((frames.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(levels, "f c h w -> f h w c")


def to_float(frames: Tensor) -> Tensor:
    """Turn uint8 [F H W 3] into float32 [F 3 H W] in [-1, 1]."""
    return rearrange(frames.float() / 127.5 - 1, "f h w c -> f c h w")


def enlarge(frames: Tensor, scale: int) -> Tensor:
    """Turn [F H W 3] into [F scale*H scale*W 3]; each pixel becomes a square."""
    return frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2) if scale > 1 else frames


def fit_image(image: Image.Image, height: int, width: int) -> Tensor:
    """Scale an RGB image to cover H x W and crop it around the centre: [3 H W] in [-1, 1]."""
    pixels = np.array(ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS))
    return to_float(torch.from_numpy(pixels)[None])[0]
