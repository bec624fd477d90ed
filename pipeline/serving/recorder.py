"""Write the clip of a running stream: its chunks go to an mp4, and the gallery shows it when the stream ends."""

from __future__ import annotations

import errno
import json
import logging
import math
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.serving.clips import NAME_BYTES, Clip, Cue, Gallery
from pipeline.serving.spec import PromptChange, StreamSpec
from pipeline.serving.viewer import Viewer
from utils.files import atomic_write_bytes, atomic_write_text, safe_stem

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

LONGEST_STEM = 60  # bytes of a clip's file name that come from its first prompt


class ClipRecorder:
    """Writes the chunks of one stream to its mp4. Only one thread may use it.

    Raises:
        OSError: the file cannot be written. Call :meth:`give_up` then.
    """

    def __init__(self, gallery: Gallery, spec: StreamSpec) -> None:
        from utils.video.write import VideoWriter

        self._gallery, self._spec = gallery, spec
        self._name = secrets.token_hex(NAME_BYTES)
        self._path = gallery.folder / f"{safe_stem(spec.prompt, LONGEST_STEM)}-{self._name}.mp4"
        self._files = ExitStack()
        self._writer = self._files.enter_context(VideoWriter(self._path, spec.fps, scale=spec.scale, keep_partial=True))
        self._frames = self._latents = 0
        self._cues: list[Cue] = []
        self._whole = True

    def write(self, frames: Tensor, end_frame: int, change: PromptChange | None) -> None:
        """Append a chunk, unless the clip is long enough.

        Args:
            frames: uint8 [F H W 3].
            end_frame: the index of the latent frame after the chunk.
            change: the change of the prompt that takes effect with this chunk.
        """
        fps = self._spec.fps
        if self._frames >= self._gallery.longest * fps:
            self._whole = False
        if not self._whole:
            return
        if change is not None:
            at = math.floor(1000 * self._frames / fps) / 1000  # rounded down, so that it is not after the frame
            self._cues.append(Cue(at, change.prompt, change.style))
        self._writer.write(frames)
        self._frames += len(frames)
        self._latents = end_frame

    def finish(self, *, visitor: str, session_id: str) -> Clip:
        """Close the file, add the clip to the gallery and return it."""
        self._files.close()
        self._save_side_files()
        spec = self._spec
        clip = Clip(
            name=self._name,
            session_id=session_id,
            visitor=visitor,
            path=self._path,
            prompts=[spec.prompt, *(cue.prompt for cue in self._cues)],
            frames=self._frames,
            fps=spec.fps,
            height=spec.height,
            width=spec.width,
            seed=spec.seed,
            whole=self._whole,
            command=self._gallery.command_line(spec, self._cues, self._latents, self._path),
        )
        self._gallery.add(clip)
        return clip

    def give_up(self, error: Exception) -> None:
        """Close the files after an error. The writer keeps the frames that it can save."""
        self._files.__exit__(type(error), error, error.__traceback__)

    def _save_side_files(self) -> None:
        """Write the storyboard, the first frame and the list for ``inference.py --i2v`` beside the clip."""
        if self._cues:
            board = [vars(cue) for cue in self._cues]
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
        self._open: dict[Viewer, ClipRecorder | None] = {}  # None: writing it has failed

    def write(self, viewer: Viewer, frames: Tensor, block: Any, change: PromptChange | None) -> None:
        """Add a chunk to the viewer's clip."""
        try:
            if viewer not in self._open:
                self._open[viewer] = None
                self._open[viewer] = ClipRecorder(self._gallery, viewer.spec)
            recorder = self._open[viewer]
            if recorder is not None:
                recorder.write(frames, block.start_frame + block.latents.shape[1], change)
        except Exception as error:
            self._give_up(viewer, error)

    def finish(self, viewer: Viewer) -> None:
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
