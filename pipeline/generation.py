"""Makes whole videos, or videos chunk by chunk, from a stream.

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
        requests: they may differ only in prompt, seed, sample and given frames.

    Yields:
        decoded frames [B F 3 H W] float32 in [-1, 1] on the CPU, each chunk as soon as it exists. A longer video begins
        with the frames of a shorter one.

    Raises:
        ValueError: the errors of :class:`Stream`.
    """
    stream = Stream(pipeline, *requests)
    chunks = list(stream) if pipeline.decode_last else stream
    for chunk in chunks:
        yield stream.decode(chunk).float().cpu()


def generate(pipeline: TextToVideo, requests: Sequence[StreamRequest]) -> Tensor:
    """Make whole videos [B F 3 H W]. Arguments are those of :func:`stream_frames`. ``num_frames`` must be finite."""
    return torch.cat(list(stream_frames(pipeline, requests)), dim=1)
