"""Write a clip as a GIF. ``workers.py`` runs this module as a program with the arguments CLIP.mp4 GIF FRAMES FPS.

It does not import torch: a GIF must not take longer to begin than to make.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from utils.gif import write_gif
from utils.video.file import sample_pictures

MOST_FRAMES = 160
MOST_HEIGHT = 480  # pixels


def write_clip_gif(clip: Path, gif: Path, frames: int, fps: float) -> None:
    """Write a looping GIF of a clip. It has at most 160 frames, spread over the whole clip, and 480 pixels in height.

    Args:
        clip: the mp4.
        gif: the file to write.
        frames: how many frames the clip has.
        fps: frames per second of the clip.
    """
    pictures = np.stack(sample_pictures(clip, min(frames, MOST_FRAMES)))
    step = -(-pictures.shape[1] // MOST_HEIGHT)
    write_gif(gif, pictures[:, ::step, ::step], fps * len(pictures) / frames)


if __name__ == "__main__":
    write_clip_gif(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
