"""Video files: `read` and `write`; frames in memory are in `utils.frames`."""

from utils.video.read import (
    count_frames,
    open_video,
    read_video,
    read_video_metadata,
    sample_frames,
    stream_video,
)
from utils.video.write import VideoWriter, frame_rate, partial_paths

__all__ = [
    "VideoWriter",
    "count_frames",
    "frame_rate",
    "open_video",
    "partial_paths",
    "read_video",
    "read_video_metadata",
    "sample_frames",
    "stream_video",
]
