"""Whole videos, and videos frame by frame, from a stream.

Shapes: B videos, F pixel frames, H W pixel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.request import StreamRequest
from pipeline.stream import Stream
from pipeline.text_to_video import TextToVideo


def stream_frames(pipeline: TextToVideo, requests: Sequence[StreamRequest]) -> Iterator[Tensor]:
    """Make videos together, as one batch, and yield their frames chunk by chunk.

    Args:
        requests: they may differ in prompt, seed, sample and given frames only.

    Yields:
        decoded frames [B F 3 H W] float32 in [-1, 1] on the CPU, each chunk as soon as it exists. A longer video begins
        with the frames of a shorter one.

    Raises:
        ValueError: as :class:`Stream`.
    """
    stream = Stream(pipeline, *requests)
    chunks = list(stream) if pipeline.decode_last else stream
    for chunk in chunks:
        yield stream.decode(chunk).float().cpu()


def generate(pipeline: TextToVideo, requests: Sequence[StreamRequest]) -> Tensor:
    """Whole videos [B F 3 H W]. Arguments as :func:`stream_frames`; ``num_frames`` must be finite."""
    return torch.cat(list(stream_frames(pipeline, requests)), dim=1)
