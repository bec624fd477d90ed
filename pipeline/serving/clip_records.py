"""What is written beside a clip, so that its browser finds it again after the server was started anew.

The id of a session is a secret that gives access to its clips. Only its hash is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write_text, is_own_file
from utils.side_files import read_json

log = logging.getLogger(__name__)

RECORD = ".clip.json"
LARGEST = 2**20  # bytes of a record


@dataclass(frozen=True)
class ClipRecord:
    """The content of the file."""

    owner: str
    """The hash of the session's id."""
    clip: dict[str, Any]
    """The fields of the clip that a client may see."""


def owner_of(session_id: str) -> str:
    """Return the hash of a session's id. An id is random and long, so nobody can guess it from its hash."""
    return hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()


def write_record(path: Path, session_id: str, clip: dict[str, Any]) -> None:
    """Write the record of the clip whose mp4 is `path`."""
    text = json.dumps({"owner": owner_of(session_id), "clip": clip}, ensure_ascii=False)
    atomic_write_text(path.with_suffix(RECORD), text)


def read_records(folder: Path, stems: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return owner -> stem of a clip -> its fields. A record that cannot be read is named in the log and left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stem in stems:
        path = folder / f"{stem}{RECORD}"
        if not is_own_file(path):
            continue
        try:
            record = read_json(path, ClipRecord, max_bytes=LARGEST)
        except (UserError, OSError) as error:
            log.warning("%s", error)
            continue
        found.setdefault(record.owner, {})[stem] = record.clip
    return found
