"""Measure streams as inference.py and the demo make them, one or several at a time, in wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from pipeline.request import StreamRequest
from pipeline.session import StreamSession, denoise_together
from pipeline.states import SessionState
from pipeline.text_to_video import TextToVideo
from scripts.measuring.bench import PROMPT, Bench, Figures
from utils.distributed import share_cores

VIEWERS = (1, 2, 4)
Advance = Callable[[Sequence[StreamSession]], list]
"""A function that returns the next chunk of each session."""


@dataclass
class Embedder:
    """Replaces the text encoder of a pipeline."""

    embed: Callable[[], Tensor]

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the embedding of one prompt. It is computed in every call."""
        return self.embed()


def session_pipeline(bench: Bench) -> TextToVideo:
    """Return the parts of a configuration."""
    denoiser = bench.denoiser()
    embedder = Embedder(bench.text(denoiser.transformer.config))
    return TextToVideo(denoiser, embedder, bench.codec(), bench.config.rollout)


def open_session(bench: Bench, pipeline: TextToVideo, seed: int = 0) -> StreamSession:
    """Open a session with the size and length of the configuration."""
    video = bench.config.video
    request = StreamRequest(PROMPT, video.height, video.width, num_frames=bench.num_frames, seed=seed)
    return StreamSession(pipeline, request)


@contextmanager
def shared_cores(bench: Bench) -> Iterator[None]:
    """Share the cores between denoising and decoding, as programs do, unless --threads was given."""
    threads = torch.get_num_threads()
    if not bench.threads:
        share_cores(bench.device)
    yield
    torch.set_num_threads(threads)


def measure_session(bench: Bench) -> Figures:
    """Measure one stream at a time, decoding beside denoising. The first frame comes before its chunk is decoded."""
    rates, first_frames, first_chunks = [], [], []
    with shared_cores(bench):
        pipeline = session_pipeline(bench)
        for _ in range(bench.repeats + 1):
            shown: list[float] = []
            begin = time.perf_counter()
            chunks = open_session(bench, pipeline).chunks(lambda _, shown=shown: shown.append(time.perf_counter()))
            arrivals = [(time.perf_counter() - begin, len(chunk.frames)) for chunk in chunks]
            first_frames.append(shown[0] - begin)
            first_chunks.append(arrivals[0][0])
            rates.append(sum(count for _, count in arrivals) / arrivals[-1][0])
    return {
        "frames/s p50": median(rates[1:]),  # the first one only warms up
        "frames/s best": max(rates[1:]),
        "first frame p50 ms": 1e3 * median(first_frames[1:]),
        "first frame best ms": 1e3 * min(first_frames[1:]),
        "first chunk p50 ms": 1e3 * median(first_chunks[1:]),
        "first chunk best ms": 1e3 * min(first_chunks[1:]),
    }


def measure_viewers(bench: Bench) -> Figures:
    """Measure several sessions on one pipeline: frames per second of all together, in turn and as one batch."""
    results: Figures = {}
    with shared_cores(bench):
        pipeline = session_pipeline(bench)
        for viewers in VIEWERS:
            alone, joined = (
                partial(watch, bench, pipeline, viewers, together) for together in (in_turn, denoise_together)
            )
            frames = viewers * pipeline.codec.num_frames(bench.num_frames)
            one_by_one, batched = (frames / seconds for seconds in bench.in_turn(alone, joined))
            results[f"{viewers} viewers in turn frames/s"] = one_by_one
            results[f"{viewers} viewers batched frames/s"] = batched
            results[f"{viewers} viewers batched / in turn"] = batched / one_by_one
    return results


def in_turn(sessions: Sequence[StreamSession]) -> list:
    """Return the next chunk of each session, made one after the other."""
    return [session.denoise() for session in sessions]


def watch(
    bench: Bench, pipeline: TextToVideo, viewers: int, advance: Callable[[Sequence[StreamSession]], list]
) -> None:
    """Make and decode the clips of several viewers that begin at the same time."""
    sessions = [open_session(bench, pipeline, seed) for seed in range(viewers)]
    while any(session.state is SessionState.running for session in sessions):
        for session, block in zip(sessions, advance(sessions), strict=True):
            if block is not None:
                session.decode(block)
