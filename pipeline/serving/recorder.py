"""Write the clip of a running stream: its chunks go to an mp4, and the gallery shows it when the stream ends."""

from __future__ import annotations

import errno
import json
import logging
import math
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.serving.clip_records import write_record
from pipeline.serving.clips import NAME_BYTES, Clip, Cue, Gallery
from pipeline.serving.spec import PromptChange, StreamSpec
from pipeline.serving.viewer import Viewer
from utils.files import atomic_write_bytes, atomic_write_text, safe_stem

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

LONGEST_STEM = 60  # bytes of a clip's file name that come from its first prompt


@dataclass
class Track:
    """The part of a stream that was made so far."""

    frames: int = 0
    """Pixel frames."""
    latents: int = 0
    """Latent frames."""
    cues: list[Cue] = field(default_factory=list)
    """The changes of the prompt."""

    def note(self, change: PromptChange, fps: float) -> None:
        """Add a change of the prompt that takes effect with the next frame. Settings of a source are ignored."""
        at = math.floor(1000 * self.frames / fps) / 1000  # rounded down, so that it is not after the frame
        settings = {name: value for name, value in change.settings.items() if name != "strength"}
        self.cues.append(Cue(at, change.prompt, change.style, settings))

    def copy(self) -> Track:
        """Return an independent copy."""
        return replace(self, cues=list(self.cues))


class ClipRecorder:
    """Writes the chunks of one stream to its mp4. Only one thread may use it.

    Args:
        begun: the part of the stream before the clip.

    Raises:
        OSError: the file cannot be written. Call :meth:`give_up` then.
    """

    def __init__(self, gallery: Gallery, spec: StreamSpec, begun: Track) -> None:
        from utils.video.write import VideoWriter

        self._gallery, self._spec = gallery, spec
        self._name = secrets.token_hex(NAME_BYTES)
        self._path = gallery.folder / f"{safe_stem(spec.prompt, LONGEST_STEM)}-{self._name}.mp4"
        self._files = ExitStack()
        self._writer = self._files.enter_context(VideoWriter(self._path, spec.fps, scale=spec.scale, keep_partial=True))
        self._begin, self._earlier = begun.frames, len(begun.cues)
        self._track = begun.copy()
        self._whole = True

    def write(self, frames: Tensor, end_frame: int, change: PromptChange | None) -> None:
        """Append a chunk, unless the clip is long enough.

        Args:
            frames: uint8 [F H W 3].
            end_frame: the index of the latent frame after the chunk.
            change: the change of the prompt that takes effect with this chunk.
        """
        track, fps = self._track, self._spec.fps
        if track.frames - self._begin >= self._gallery.longest * fps:
            self._whole = False
        if not self._whole:
            return
        if change is not None:
            track.note(change, fps)
        self._writer.write(frames)
        track.frames += len(frames)
        track.latents = end_frame

    def finish(self, *, visitor: str, session_id: str) -> Clip:
        """Close the file, add the clip to the gallery and return it."""
        self._files.close()
        self._save_side_files()
        spec, track = self._spec, self._track
        prompts = [spec.prompt, *(cue.prompt for cue in track.cues)]
        seen = prompts[self._earlier :]
        clip = Clip(
            name=self._name,
            session_id=session_id,
            visitor=visitor,
            path=self._path,
            prompts=[prompt for prompt, before in zip(seen, [None, *seen], strict=False) if prompt != before],
            frames=track.frames - self._begin,
            fps=spec.fps,
            height=spec.height,
            width=spec.width,
            seed=spec.seed,
            whole=self._whole,
            begin=round(self._begin / spec.fps, 3),
            command="" if spec.source is not None else self._command(),
        )
        write_record(self._path, session_id, clip.describe())
        self._gallery.add(clip)
        return clip

    def _command(self) -> str:
        return self._gallery.command_line(self._spec, self._track.cues, self._track.latents, self._path)

    def give_up(self, error: Exception) -> None:
        """Close the files after an error. The writer keeps the frames that it can save."""
        self._files.__exit__(type(error), error, error.__traceback__)

    def _save_side_files(self) -> None:
        """Write the storyboard, the first frame and the list for ``inference.py --i2v`` beside the clip."""
        if self._track.cues:
            board = [cue.entry for cue in self._track.cues]
            atomic_write_text(self._path.with_suffix(".yaml"), yaml.safe_dump(board, allow_unicode=True))
        if self._spec.image is not None:
            picture = self._path.with_suffix(".png")
            atomic_write_bytes(picture, self._spec.image)
            entry = {"image": picture.name, "prompt": self._spec.prompt}
            atomic_write_text(self._path.with_suffix(".jsonl"), json.dumps(entry, ensure_ascii=False) + "\n")


class Recorders:
    """The clips that are being written. If a clip cannot be written, the viewer is told and the stream continues."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._tracks: dict[Viewer, Track] = {}
        self._open: dict[Viewer, ClipRecorder | None] = {}  # None: writing it has failed

    def write(self, viewer: Viewer, frames: Tensor, block: Any, change: PromptChange | None, *, record: bool) -> None:
        """Add a chunk to the viewer's clip. The clip begins with a chunk to record and ends before one that is not."""
        track = self._tracks.setdefault(viewer, Track())
        end = block.start_frame + block.latents.shape[1]
        if record:
            self._add(viewer, track, frames, end, change)
        else:
            self._end_clip(viewer)
        if change is not None:
            track.note(change, viewer.spec.fps)
        track.frames += len(frames)
        track.latents = end

    def finish(self, viewer: Viewer) -> None:
        """Finish the viewer's clip, if it has one, because its stream is over."""
        self._end_clip(viewer)
        self._tracks.pop(viewer, None)

    def _add(self, viewer: Viewer, track: Track, frames: Tensor, end_frame: int, change: PromptChange | None) -> None:
        try:
            if viewer not in self._open:
                self._open[viewer] = None
                self._open[viewer] = ClipRecorder(self._gallery, viewer.spec, track)
            recorder = self._open[viewer]
            if recorder is not None:
                recorder.write(frames, end_frame, change)
        except Exception as error:
            self._give_up(viewer, error)

    def _end_clip(self, viewer: Viewer) -> None:
        """Finish the viewer's clip, if it has one, and tell the viewer."""
        try:
            recorder = self._open.get(viewer)
            if recorder is not None:
                clip = recorder.finish(visitor=viewer.visitor, session_id=viewer.session_id)
                viewer.deliver({"type": "clip", "stream": viewer.number, "clip": clip.describe()})
        except Exception as error:
            self._give_up(viewer, error)
        finally:
            self._open.pop(viewer, None)

    def _give_up(self, viewer: Viewer, error: Exception) -> None:
        reason = _reason(error)
        log.warning("a clip was not saved: %s", reason)
        viewer.deliver({"type": "notice", "stream": viewer.number, "message": f"This video is not saved: {reason}."})
        recorder, self._open[viewer] = self._open.get(viewer), None
        if recorder is not None:
            try:
                recorder.give_up(error)
            except Exception:
                log.debug("closing a clip failed", exc_info=True)


def _reason(error: Exception) -> str:
    """Return the error in words, without paths of the server."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk for clips is full"
    if isinstance(error, OSError) and error.strerror:
        return f"the clips folder cannot be written ({error.strerror})"
    return f"{type(error).__name__} while writing the clip"
