"""Reads the frames of video files into tensors; `utils.video.file` opens the files.

Shapes: F frames, H height, W width. Pixels are float in [-1, 1] as [F 3 H W] or uint8 in [0, 255] as [F H W 3].
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.frames import fit_image
from utils.video.file import NO_FRAMES, open_video, sample_pictures


def read_video(path: str | Path) -> Tensor:
    """Read all frames of a video file, uint8 [F H W 3]. Raises UserError if it is missing or not a video."""
    with open_video(path) as video:
        return _stack(video.pictures())


def sample_frames(path: str | Path, count: int) -> Tensor:
    """Read `count` evenly spaced frames, uint8 [count H W 3]. No other frames are kept in memory.

    Raises UserError if the file is missing or not a video.
    """
    return _stack(sample_pictures(path, count))


def stream_video(path: str | Path, height: int, width: int, fps: float) -> Iterator[Tensor]:
    """Yield the frames of a video file one by one, [1 3 H W] in [-1, 1], `fps` of them a second.

    Frame k is the one that a player shows at k / fps seconds, so the speed stays the same: frames are repeated or left
    out. Each is scaled to cover H x W and cropped around the centre.

    Raises:
        UserError: the file is missing or not a video.
    """
    with open_video(path) as video:
        for frame, count in video.sampled(fps):
            if count:
                picture = fit_image(video.picture(frame), height, width)[None]
                for _ in range(count):
                    yield picture


def _stack(pictures: Iterable[Image.Image]) -> Tensor:
    """Stack images to uint8 [F H W 3]. Raises ValueError if there are none or they differ in size."""
    frames = [torch.from_numpy(np.array(picture)) for picture in pictures]
    if not frames:
        raise ValueError(NO_FRAMES)
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise ValueError("its frames have different sizes")
    return torch.stack(frames)
