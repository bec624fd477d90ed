"""Writes GIFs."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np

from utils.files import atomic_path


def write_gif(path: str | Path, pixels: np.ndarray, fps: float) -> None:
    """Write frames, uint8 [F H W 3], as a looping GIF.

    Delays are multiples of 10 ms, so the speed is the nearest possible one.
    """
    if len(pixels) == 0:
        raise ValueError(f"no frames to write to {path}")
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, pixels, plugin="pillow", extension=".gif", duration=round(1000 / fps), loop=0)
