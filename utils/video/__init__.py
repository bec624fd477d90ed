"""Video files: `read` and `write`; frames in memory are in `utils.frames`."""

from utils.frames import enlarge, evenly_spaced, fit_image, to_uint8
from utils.images import load_image
from utils.previews import contact_sheet, save_contact_sheet, write_gif
from utils.video.read import (
    count_frames,
    open_video,
    read_metadata,
    read_video,
    sample_frames,
    stream_video,
)
from utils.video.write import VideoWriter, frame_rate, partial_paths

__all__ = [
    "VideoWriter",
    "contact_sheet",
    "count_frames",
    "enlarge",
    "evenly_spaced",
    "fit_image",
    "frame_rate",
    "load_image",
    "open_video",
    "partial_paths",
    "read_metadata",
    "read_video",
    "sample_frames",
    "save_contact_sheet",
    "stream_video",
    "to_uint8",
    "write_gif",
]
