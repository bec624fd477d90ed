"""The gallery: finished clips, each with the command that makes the same video again.

A clip is an mp4 with side files of the same stem: a GIF if somebody asked for one, the first frame as .png with its
.jsonl, the prompts as .yaml. The folder may hold clips of earlier runs and other people's files.
"""

from __future__ import annotations

import re
import shlex
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.serving.limits import greediest
from pipeline.serving.spec import StreamSpec
from utils.files import is_own_file

NAME_BYTES = 12  # of randomness in a clip's name
SUFFIXES = (".partial.mp4", ".mp4.part", ".mp4", ".gif", ".png", ".jsonl", ".yaml")  # all files of a clip
OWN_STEM = re.compile(rf".+-[0-9a-f]{{{2 * NAME_BYTES}}}")
EARLIER_RUNS = "earlier runs"  # in place of a visitor


@dataclass(frozen=True)
class Clip:
    """A finished video."""

    name: str
    """Unguessable; also in the file's name."""
    session_id: str
    """Whose gallery shows it."""
    visitor: str
    """Whose share of the clips it counts for."""
    path: Path
    """The mp4."""
    prompts: list[str]
    """The first one and those that followed."""
    frames: int
    """Pixel frames."""
    fps: int
    height: int
    width: int
    """Pixels of the model's frames; the file may be enlarged."""
    seed: int
    whole: bool
    """False if the stream was longer than the clip."""
    command: str
    """The shell command that makes it again."""
    made: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def describe(self) -> dict[str, Any]:
        """What the viewer is told."""
        return {key: value for key, value in vars(self).items() if key not in ("session_id", "visitor", "path")}


@dataclass(frozen=True)
class Cue:
    """A prompt that a stream changed to."""

    at: float
    """Seconds into the video."""
    prompt: str
    style: str


class Gallery:
    """Finished clips. If there are too many, the oldest of the visitor with the most clips goes with its files.

    Args:
        folder: where files go. Clips that earlier runs left there count as those of one visitor.
        command: arguments that make the first so many latent frames of a stream again, with the prompts it changed to;
            the path is the clip's mp4.
        longest: seconds of a clip.
        most: clips kept.
    """

    def __init__(
        self,
        folder: Path,
        command: Callable[[StreamSpec, list[Cue], int, Path], list[str]],
        *,
        longest: float = 120.0,
        most: int = 200,
    ) -> None:
        self.folder, self.longest = folder, longest
        self._command, self._most = command, most
        self._lock = threading.Lock()
        self._clips: dict[str, Clip] = {}
        self._listeners: dict[str, list[Callable[[dict[str, Any]], None]]] = {}
        self._stems: OrderedDict[str, str] = OrderedDict.fromkeys(_stems(folder), EARLIER_RUNS)  # with their visitors

    def command_line(self, spec: StreamSpec, cues: list[Cue], latents: int, path: Path) -> str:
        """The shell command that makes a clip again, without any control character."""
        return " ".join(map(quoted, self._command(spec, cues, latents, path)))

    def listen(self, session_id: str, deliver: Callable[[dict[str, Any]], None]) -> None:
        """Tell a page of the session about clips that come and go, also those that another page of it made."""
        with self._lock:
            self._listeners.setdefault(session_id, []).append(deliver)

    def unlisten(self, session_id: str, deliver: Callable[[dict[str, Any]], None]) -> None:
        """Tell it no more."""
        with self._lock:
            self._listeners[session_id].remove(deliver)
            if not self._listeners[session_id]:
                del self._listeners[session_id]

    def add(self, clip: Clip) -> None:
        """Show a clip, and make room."""
        with self._lock:
            self._clips[clip.name] = clip
            self._stems[clip.path.stem] = clip.visitor
            surplus = []
            while len(self._stems) > self._most:
                surplus.append(self._next_to_go())
                del self._stems[surplus[-1]]
            gone = [each for each in self._clips.values() if each.path.stem not in self._stems]
            for each in gone:
                del self._clips[each.name]
        for stem in surplus:
            self._delete_files(stem)
        self._tell(clip.session_id, {"type": "clip", "clip": clip.describe()})
        for each in gone:
            self._tell(each.session_id, {"type": "clip_deleted", "name": each.name})

    def remove(self, clip: Clip) -> None:
        """Delete a clip with its files."""
        with self._lock:
            self._clips.pop(clip.name, None)
            self._stems.pop(clip.path.stem, None)
        self._delete_files(clip.path.stem)
        self._tell(clip.session_id, {"type": "clip_deleted", "name": clip.name})

    def get(self, name: str) -> Clip | None:
        """The clip of that name."""
        with self._lock:
            return self._clips.get(name)

    def of(self, session_id: str) -> list[Clip]:
        """Clips of one session, the latest first."""
        with self._lock:
            return [clip for clip in reversed(self._clips.values()) if clip.session_id == session_id]

    def _tell(self, session_id: str, message: dict[str, Any]) -> None:
        with self._lock:
            listeners = list(self._listeners.get(session_id, ()))
        for deliver in listeners:
            deliver(message)

    def _next_to_go(self) -> str:
        """The oldest clip of the visitor with the most clips."""
        visitor = greediest(self._stems.values())
        return next(stem for stem, owner in self._stems.items() if owner == visitor)

    def _delete_files(self, stem: str) -> None:
        for suffix in SUFFIXES:
            (self.folder / f"{stem}{suffix}").unlink(missing_ok=True)  # a link goes, what it points to stays


def _stems(folder: Path) -> list[str]:
    """Stems of the clips that lie in a folder, the oldest first. Files of other names and links are not ours."""
    found: dict[str, float] = {}
    for path in folder.glob("*") if folder.is_dir() else ():
        stem = next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), "")
        if OWN_STEM.fullmatch(stem) and is_own_file(path):
            found[stem] = max(found.get(stem, 0.0), path.lstat().st_mtime)
    return sorted(found, key=found.__getitem__)


def quoted(argument: str) -> str:
    """An argument for a POSIX shell. Control and direction characters are written as escapes, as in ``$'\\n'``."""
    if not any(is_control(character) for character in argument):
        return shlex.quote(argument)
    pieces = []
    for character in argument:
        if is_control(character):
            pieces.append("".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape")))
        else:
            pieces.append(f"\\{character}" if character in "\\'" else character)
    return f"$'{''.join(pieces)}'"


def is_control(character: str) -> bool:
    """Whether a character moves the cursor, ends the line, or turns the direction of the text."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(character) in (
        *("LRE", "RLE", "LRO", "RLO", "PDF"),
        *("LRI", "RLI", "FSI", "PDI"),
    )
