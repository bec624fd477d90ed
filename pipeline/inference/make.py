"""One video: a job becomes a stream, and the stream becomes a file."""

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
from utils.signals import StopSignals
from utils.video import VideoWriter, load_image, stream_video

log = logging.getLogger("inference")

TELL_SECONDS = 30.0  # between lines about a long video if there is no progress bar
REPEAT = 2.0  # seconds in which torchrun passes on the Ctrl-C that every process has received already


@dataclass(frozen=True)
class MadeVideo:
    """What came of a job."""

    frames: int
    """Pixel frames, those of a video that was extended included."""
    seconds: float
    finished: bool
    signal: signal.Signals | None
    """The signal that asked for the end, if one came."""


def make_video(
    pipeline: TextToVideo, placement: Placement, config: PipelineConfig, bar: tqdm, *, writes: bool
) -> MadeVideo:
    """Make one video. Without `writes` another process writes the file, and this one computes its share.

    A signal stops the video; what is there stays under a partial name. Raises UserError if the file cannot be written.
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
                "stopped after %d frames; %s plays, and the same command makes the whole video", frames, partial
            )
    return MadeVideo(frames, time.perf_counter() - started, finished, signals.received)


def request(job: Job, config: PipelineConfig, codec: VideoCodec) -> StreamRequest:
    """Return what a job asks of the pipeline. The times of its prompts count from where its own frames begin."""
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
    """Return as many of the last frames [F 3 H W] as the first new chunk sees, or two chunks if it sees all."""
    chunk = rollout.frames_per_chunk
    seen = 2 * chunk if rollout.window is None else max(1, rollout.window - chunk)
    kept = torch.cat(list(deque(frames, maxlen=codec.num_frames(seen))))
    return kept[(len(kept) - 1) % codec.temporal_scale :]


def _write_video(session: StreamSession, placement: Placement, video: VideoConfig, bar: tqdm) -> int:
    """Write a session's chunks to a file as they come; return the number of frames. Without frames there is no file."""
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
    """Yield all frames of the file. A video that is extended comes first, in place of the chunk of its last frames."""
    begin: Iterable[Tensor] = [first.frames]
    if job.extends is not None:
        begin = stream_video(job.extends, video.height, video.width, video.fps)
    return itertools.chain(begin, (chunk.frames for chunk in chunks))


def _write_behind(writer: VideoWriter, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """Write each part on a thread while the next one is made; yield the parts."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as worker:
        writing = None
        for part in parts:
            if writing is not None:
                writing.result()
            writing = worker.submit(writer.write, part)
            yield part
        if writing is not None:
            writing.result()
