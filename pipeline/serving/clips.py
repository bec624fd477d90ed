"""The gallery: finished clips, each with the command that makes the same video again.

A clip is an mp4. Files with the same stem belong to it: a .gif if somebody asked for one, a .png with the first frame
and a .jsonl that names it, a .yaml with the prompts, a .clip.json for later runs of the server. The folder may also
hold clips of earlier runs and foreign files.
"""

from __future__ import annotations

import logging
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

from pipeline.serving.clip_records import RECORD, owner_of, read_records
from pipeline.serving.limits import greediest
from pipeline.serving.spec import StreamSpec
from utils.errors import UserError
from utils.files import is_own_file
from utils.side_files import check_schema

log = logging.getLogger(__name__)

NAME_BYTES = 12  # random bytes in the name of a clip
SUFFIXES = (".partial.mp4", ".mp4.part", ".mp4", ".gif", ".png", ".jsonl", ".yaml", RECORD)  # of the files of a clip
OWN_STEM = re.compile(rf".+-[0-9a-f]{{{2 * NAME_BYTES}}}")
EARLIER_RUNS = "earlier runs"  # counts as the visitor of the clips of earlier runs


@dataclass(frozen=True)
class Clip:
    """A finished video."""

    name: str
    """A random name that nobody can guess. It is part of the file name."""
    session_id: str
    """The session whose gallery shows the clip."""
    visitor: str
    """The visitor whose share of the clips it counts for."""
    path: Path
    """The mp4 file."""
    prompts: list[str]
    """All prompts of the video in order."""
    frames: int
    """Pixel frames."""
    fps: int
    height: int
    width: int
    """Height and width of the model's frames in pixels. The file may be larger by a whole factor."""
    seed: int
    whole: bool
    """False if the stream was longer than the clip."""
    command: str
    """The shell command that makes it again."""
    begin: float = 0.0
    """Seconds of the stream before the clip."""
    made: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def describe(self) -> dict[str, Any]:
        """Return the fields that a client may see."""
        return {key: value for key, value in vars(self).items() if key not in ("session_id", "visitor", "path")}


@dataclass(frozen=True)
class Cue:
    """A change of the prompt of a stream."""

    at: float
    """Seconds from the beginning of the video."""
    prompt: str
    style: str
    settings: dict[str, int | float] = field(default_factory=dict)
    """Seed, steps and chunks of a blend that change with it."""

    @property
    def entry(self) -> dict[str, Any]:
        """The cue as an entry of a storyboard."""
        return {"at": self.at, "prompt": self.prompt, "style": self.style, **self.settings}


class Gallery:
    """The finished clips. If there are too many, the oldest clip of the visitor with the most clips is deleted.

    Args:
        folder: where files go. Clips that earlier runs left there count as clips of one visitor.
        command: returns the arguments of the command that makes a clip again. It gets the stream, its changes of the
            prompt, the number of latent frames and the path of the clip's mp4.
        longest: the longest clip in seconds.
        most: how many clips are kept.
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
        self._stems: OrderedDict[str, str] = OrderedDict.fromkeys(_stems(folder), EARLIER_RUNS)  # stem -> visitor
        self._earlier = read_records(folder, self._stems)  # until the browser that owns them comes back

    def command_line(self, spec: StreamSpec, cues: list[Cue], latents: int, path: Path) -> str:
        """Return the shell command that makes a clip again. It holds no control character."""
        return " ".join(map(quoted, self._command(spec, cues, latents, path)))

    def listen(self, session_id: str, deliver: Callable[[dict[str, Any]], None]) -> None:
        """Call `deliver` when a clip of the session is added or deleted, by any page of the session."""
        with self._lock:
            self._listeners.setdefault(session_id, []).append(deliver)

    def unlisten(self, session_id: str, deliver: Callable[[dict[str, Any]], None]) -> None:
        """Stop calling `deliver`."""
        with self._lock:
            self._listeners[session_id].remove(deliver)
            if not self._listeners[session_id]:
                del self._listeners[session_id]

    def add(self, clip: Clip) -> None:
        """Add a clip, and delete others if there are too many now."""
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

    def recall(self, session_id: str, visitor: str) -> bool:
        """Serve the clips again that a session made before the server was started anew.

        Args:
            session_id: the id, which only the browser of that session knows.
            visitor: the visitor that the clips count for from now on.

        Returns:
            Whether there are any.
        """
        with self._lock:
            records = self._earlier.pop(owner_of(session_id), {})
            for stem, fields in records.items():
                path = self.folder / f"{stem}.mp4"
                own = {"session_id": session_id, "visitor": visitor, "path": path}
                try:
                    clip = check_schema({**fields, **own}, Clip, f"{path.with_suffix(RECORD)}")
                except UserError as error:
                    log.warning("%s", error)
                    continue
                if stem in self._stems and stem.endswith(f"-{clip.name}") and is_own_file(path):
                    self._clips[clip.name], self._stems[stem] = clip, visitor
        return bool(records)

    def get(self, name: str) -> Clip | None:
        """Return the clip of that name, or None."""
        with self._lock:
            return self._clips.get(name)

    def of(self, session_id: str) -> list[Clip]:
        """Return the clips of one session, the latest first."""
        with self._lock:
            return [clip for clip in reversed(self._clips.values()) if clip.session_id == session_id]

    def _tell(self, session_id: str, message: dict[str, Any]) -> None:
        with self._lock:
            listeners = list(self._listeners.get(session_id, ()))
        for deliver in listeners:
            deliver(message)

    def _next_to_go(self) -> str:
        """Return the stem of the oldest clip of the visitor with the most clips."""
        visitor = greediest(self._stems.values())
        return next(stem for stem, owner in self._stems.items() if owner == visitor)

    def _delete_files(self, stem: str) -> None:
        for suffix in SUFFIXES:
            (self.folder / f"{stem}{suffix}").unlink(missing_ok=True)  # of a link, only the link itself


def _stems(folder: Path) -> list[str]:
    """Return the stems of the clips in a folder, the oldest first. Links and files with other names are ignored."""
    found: dict[str, float] = {}
    for path in folder.glob("*") if folder.is_dir() else ():
        stem = next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), "")
        if OWN_STEM.fullmatch(stem) and is_own_file(path):
            found[stem] = max(found.get(stem, 0.0), path.lstat().st_mtime)
    return sorted(found, key=found.__getitem__)


def quoted(argument: str) -> str:
    """Quote an argument for a POSIX shell. Control and direction characters become escapes, as in ``$'\\n'``."""
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
    """Return whether a character moves the cursor, ends the line, or changes the direction of the text."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(character) in (
        *("LRE", "RLE", "LRO", "RLO", "PDF"),
        *("LRI", "RLI", "FSI", "PDI"),
    )
