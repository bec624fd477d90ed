"""The gallery: every stream leaves an mp4, and the command that makes the same video again.

A clip begins with its stream and ends with it, or at a longest length.
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from utils.files import atomic_write_bytes, atomic_write_text, safe_stem

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.serving.hub import Stream

MOST_GIF_FRAMES = 160
MOST_GIF_HEIGHT = 480
SUFFIXES = (".mp4", ".gif", ".png", ".jsonl", ".yaml")  # all files of a clip


@dataclass(frozen=True)
class Clip:
    """A finished video."""

    name: str
    """Unguessable; also in the file's name."""
    owner: str
    """Whose gallery shows it."""
    path: Path
    """The mp4."""
    prompts: list[str]
    """The first one and those switched to."""
    frames: int
    """Pixel frames."""
    fps: int
    height: int
    width: int
    """Pixels of the model's frames; the file may be enlarged."""
    whole: bool
    """False where the stream was longer than the clip."""
    command: str
    """The shell command that makes it again."""
    made: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def describe(self) -> dict[str, Any]:
        """What its owner is told."""
        return {key: value for key, value in vars(self).items() if key not in ("owner", "path")}


@dataclass(frozen=True)
class Cue:
    """A prompt that a stream was switched to."""

    at: float
    """Seconds into the video, rounded down so that a frame's time does not pass it."""
    prompt: str
    style: str


@dataclass
class Gallery:
    """Finished clips; the oldest goes with its files once there are too many."""

    folder: Path
    """Where files go."""
    command: Callable[[Stream, list[Cue], int, Path], list[str]]
    """Arguments that make the first so many latent frames of a stream again, with the prompts it was switched to;
    the path is the clip's mp4, beside which lie its first frame as .png and .jsonl and its storyboard as .yaml."""
    longest: float = 120.0
    """Seconds of a clip."""
    most: int = 200
    """Clips kept."""
    _clips: dict[str, Clip] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _gif_lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, clip: Clip) -> None:
        """Show a clip; the oldest makes room."""
        with self._lock:
            self._clips[clip.name] = clip
            surplus = [self._clips.pop(name) for name in list(self._clips)[: -self.most]]
        for old in surplus:
            for suffix in SUFFIXES:
                old.path.with_suffix(suffix).unlink(missing_ok=True)

    def get(self, name: str) -> Clip | None:
        """The clip of that name."""
        with self._lock:
            return self._clips.get(name)

    def of(self, owner: str) -> list[Clip]:
        """Clips of one owner, the latest first."""
        with self._lock:
            return [clip for clip in reversed(self._clips.values()) if clip.owner == owner]

    def gif(self, clip: Clip) -> Path:
        """The clip as a looping GIF, made on first use: at most 160 frames, from first to last, 480 pixels high."""
        from utils.video import sample_frames, write_gif

        path = clip.path.with_suffix(".gif")
        with self._gif_lock:  # one at a time, as each holds its frames in memory
            if not path.exists():
                frames = sample_frames(clip.path, min(clip.frames, MOST_GIF_FRAMES))
                step = -(-frames.shape[1] // MOST_GIF_HEIGHT)
                write_gif(path, frames[:, ::step, ::step], clip.fps * len(frames) / clip.frames)
        return path


class ClipRecorder:
    """Writes one stream's chunks to its mp4. Used by one thread."""

    def __init__(self, gallery: Gallery, stream: Stream) -> None:
        from utils.video import VideoWriter

        self._gallery, self._stream = gallery, stream
        self._name = secrets.token_hex(12)
        self._path = gallery.folder / f"{safe_stem(stream.spec.prompt, 60)}-{self._name}.mp4"
        self._files = ExitStack()
        self._writer = self._files.enter_context(VideoWriter(self._path, stream.spec.fps, scale=stream.spec.scale))
        self._frames = self._latents = 0
        self._cues: list[Cue] = []
        self._whole = True

    def write(self, frames: Tensor, start_frame: int, end_frame: int) -> None:
        """Append a chunk's frames, uint8 [F H W 3], of a range of latent frames, unless the clip is long enough."""
        fps = self._stream.spec.fps
        if self._frames >= self._gallery.longest * fps:
            self._whole = False
        if not self._whole:
            return
        at = math.floor(1000 * self._frames / fps) / 1000
        switches = [switch for frame, switch in self._stream.switches if frame == start_frame]
        self._cues += [Cue(at, switch.prompt, switch.style) for switch in switches]
        self._writer.write(frames)
        self._frames += len(frames)
        self._latents = end_frame

    def finish(self) -> Clip:
        """Close the file and show it in the gallery."""
        self._files.close()
        spec = self._stream.spec
        if spec.image is not None:
            self._save_image(spec.image)
        if self._cues:
            board = [vars(cue) for cue in self._cues]
            atomic_write_text(self._path.with_suffix(".yaml"), yaml.safe_dump(board, allow_unicode=True))
        clip = Clip(
            name=self._name,
            owner=self._stream.owner,
            path=self._path,
            prompts=[spec.prompt, *(cue.prompt for cue in self._cues)],
            frames=self._frames,
            fps=spec.fps,
            height=spec.height,
            width=spec.width,
            whole=self._whole,
            command=shlex.join(self._gallery.command(self._stream, self._cues, self._latents, self._path)),
        )
        self._gallery.add(clip)
        return clip

    def _save_image(self, image: bytes) -> None:
        """The first frame beside the clip, and the list that inference.py --i2v reads."""
        path = self._path.with_suffix(".png")
        atomic_write_bytes(path, image)
        entry = {"image": path.name, "prompt": self._stream.spec.prompt}
        atomic_write_text(self._path.with_suffix(".jsonl"), json.dumps(entry, ensure_ascii=False) + "\n")
