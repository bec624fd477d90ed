"""A clip as a GIF. Run as a program by ``workers.py``: CLIP.mp4 GIF FRAMES FPS."""

from __future__ import annotations

import sys
from pathlib import Path

MOST_FRAMES = 160
MOST_HEIGHT = 480  # pixels


def write_clip_gif(clip: Path, gif: Path, frames: int, fps: float) -> None:
    """Write a looping GIF of a clip: at most 160 frames, from first to last, at most 480 pixels high.

    Args:
        clip: the mp4.
        gif: the file to write.
        frames: how many frames the clip has.
        fps: frames a second at which it plays.
    """
    from utils.video import sample_frames, write_gif

    pictures = sample_frames(clip, min(frames, MOST_FRAMES))
    step = -(-pictures.shape[1] // MOST_HEIGHT)
    write_gif(gif, pictures[:, ::step, ::step], fps * len(pictures) / frames)


if __name__ == "__main__":
    write_clip_gif(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
