"""Make one video: turn a job into a stream, and write the stream to a file."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model.codec import VideoCodec
from pipeline.config import PipelineConfig, VideoConfig
from pipeline.inference.folder import Placement, settle_partials
from pipeline.inference.plan import Job
from pipeline.request import StreamRequest
from pipeline.rollout import RolloutConfig
from pipeline.session import Chunk, StreamSession
from pipeline.states import SessionState
from pipeline.storyboard import schedule
from pipeline.text_to_video import TextToVideo
from utils.distributed import is_launched
from utils.images import load_image
from utils.signals import StopSignals
from utils.video.read import stream_video
from utils.video.write import VideoWriter

log = logging.getLogger("inference")

TELL_SECONDS = 30.0  # between log lines about a long video if there is no progress bar
REPEAT = 2.0  # seconds; torchrun sends a Ctrl-C again that every process has already received


@dataclass(frozen=True)
class MadeVideo:
    """The result of a job."""

    frames: int
    """Number of pixel frames of the file. If a video was extended, its own frames count too."""
    seconds: float
    finished: bool
    signal: signal.Signals | None
    """The signal that stopped the video, if one came."""


def make_video(
    pipeline: TextToVideo, placement: Placement, config: PipelineConfig, bar: tqdm, *, writes: bool
) -> MadeVideo:
    """Make one video. If `writes` is false, another process writes the file, and this one only computes its share.

    A signal stops the video. The frames made so far are kept under a partial name. Raises UserError if the file cannot
    be written.
    """
    started = time.perf_counter()
    session = StreamSession(pipeline, request(placement.job, config, pipeline.codec))
    with StopSignals(on_signal=lambda _: session.stop(), repeat_within=REPEAT if is_launched() else 0.0) as signals:
        if writes:
            frames = _write_video(session, placement, config.video, bar)
        else:
            frames = sum(len(chunk.frames) for chunk in session)
    finished = session.state is SessionState.finished
    if writes:
        partial = settle_partials(placement.path, placement.job.recipe, finished=finished)
        if partial is not None:
            log.warning(
                "stopped after %d frames; %s can be played, and the same command makes the whole video", frames, partial
            )
    return MadeVideo(frames, time.perf_counter() - started, finished, signals.received)


def request(job: Job, config: PipelineConfig, codec: VideoCodec) -> StreamRequest:
    """Return the request of a job to the pipeline. The times of its prompts count from its first new frame."""
    video, recipe = config.video, job.recipe
    size, context, num_frames, shown = (video.height, video.width), None, video.num_frames, 0
    if job.image is not None:
        context = load_image(job.image, *size)[None]
    elif job.extends is not None:
        context = last_frames(stream_video(job.extends, *size, video.fps), config.rollout, codec)
        num_frames, shown = num_frames + codec.num_latents(len(context)), len(context)
    return StreamRequest(
        recipe.prompt,
        *size,
        seed=recipe.seed,
        sample=recipe.sample,
        num_frames=num_frames if job.follows is None else None,
        context_frames=context,
        source=None if job.follows is None else stream_video(job.follows, *size, video.fps),
        strength=1.0 if recipe.strength is None else recipe.strength,
        switches=schedule(job.cues, video.fps, begin=shown),
    )


def last_frames(frames: Iterable[Tensor], rollout: RolloutConfig, codec: VideoCodec) -> Tensor:
    """Return the last frames [F 3 H W]: as many as the first new chunk attends to, or two chunks without a window."""
    chunk = rollout.frames_per_chunk
    seen = 2 * chunk if rollout.window is None else max(1, rollout.window - chunk)
    kept = torch.cat(list(deque(frames, maxlen=codec.num_frames(seen))))
    return kept[(len(kept) - 1) % codec.temporal_scale :]


def _write_video(session: StreamSession, placement: Placement, video: VideoConfig, bar: tqdm) -> int:
    """Write each chunk of a session to a file when it is made. Return the number of frames. No frames, no file."""
    with closing(iter(session)) as chunks:
        first = next(chunks, None)
        if first is None:
            return 0
        frames, told = 0, time.perf_counter()
        writer = VideoWriter(
            placement.path,
            video.fps,
            scale=video.scale,
            metadata=placement.job.recipe.tags,
            keep_partial=True,
        )
        with writer:
            for part in _write_behind(writer, _all_frames(placement.job, first, chunks, video)):
                frames += len(part)
                bar.update(len(part))
                if bar.disable and time.perf_counter() - told > TELL_SECONDS:
                    told = time.perf_counter()
                    log.info("%s: %d frames so far", placement.path.name, frames)
            if session.state is not SessionState.finished:
                writer.stop()
    return frames


def _all_frames(job: Job, first: Chunk, chunks: Iterator[Chunk], video: VideoConfig) -> Iterator[Tensor]:
    """Yield the frames of the file. An extended video comes first, in place of the first chunk (a repeat)."""
    begin: Iterable[Tensor] = [first.frames]
    if job.extends is not None:
        begin = stream_video(job.extends, video.height, video.width, video.fps)
    return itertools.chain(begin, (chunk.frames for chunk in chunks))


def _write_behind(writer: VideoWriter, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the parts. A thread writes each part while the next one is made."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as worker:
        writing = None
        for part in parts:
            if writing is not None:
                writing.result()
            writing = worker.submit(writer.write, part)
            yield part
        if writing is not None:
            writing.result()
