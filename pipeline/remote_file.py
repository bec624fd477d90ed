"""A file of a Hugging Face repository, downloaded so that a later process continues what an earlier one began.

The client of the hub writes each attempt into a file of its own, and begins anew after a crash.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import ModelInfo, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from utils.errors import UserError
from utils.files import set_aside
from utils.locks import try_lock

log = logging.getLogger(__name__)

PART = ".part"
PIECE = 2**24  # bytes that are hashed at once


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it. `into` is the local folder that mirrors its repository."""

    repository: str
    revision: str
    """Commit."""
    name: str
    """Path in the repository."""
    size: int
    """Bytes."""
    sha256: str | None
    """The hash of the content. The hub states it for large files."""

    @classmethod
    def of(cls, info: ModelInfo, entry: RepoSibling) -> RemoteFile:
        """Return what the hub says about an entry of a repository. Raises UserError for a path that leads outside."""
        parts = PurePosixPath(entry.rfilename).parts
        if not parts or ".." in parts or os.path.isabs(entry.rfilename) or "\\" in entry.rfilename:
            raise UserError(
                f"{info.id}: the name {entry.rfilename!r} leads out of the folder; do not use this repository"
            )
        sha256 = None if entry.lfs is None else entry.lfs.sha256
        return cls(info.id, info.sha or "main", entry.rfilename, entry.size or 0, sha256)

    def is_here(self, into: Path) -> bool:
        """Return whether the file is there with its size."""
        path = into / self.name
        return path.is_file() and path.stat().st_size == self.size

    def bytes_here(self, into: Path) -> int:
        """Return how many bytes of the file are here: all, or those that earlier attempts have left."""
        if self.is_here(into):
            return self.size
        part = self._part(into)
        return min(part.stat().st_size, self.size) if part.is_file() else 0

    def download(self, into: Path) -> None:
        """Download the file with progress, from where an earlier attempt stopped. A file in its place is set aside.

        Raises:
            UserError: another process downloads it, or the content is not what the hub says.
            Exception: those of the hub's client.
        """
        path, part = into / self.name, self._part(into)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._forget_other_revisions(part)
        with part.open("ab") as data:
            if not try_lock(data.fileno()):
                raise UserError(f"{path}: another process downloads it; wait for it to end")
            if data.tell() > self.size:
                data.truncate(0)
            self._fetch(data)
        self._check(part)
        if os.path.lexists(path):
            set_aside(path, f"does not have the {self.size} bytes that the hub states", log)
        os.replace(part, path)

    def _part(self, into: Path) -> Path:
        path = into / self.name
        return path.with_name(f".{path.name}.{self.revision[:12]}{PART}")

    def _forget_other_revisions(self, part: Path) -> None:
        """Delete what attempts at other revisions have left."""
        for other in part.parent.glob(f".{glob.escape(Path(self.name).name)}.*{PART}"):
            if other != part:
                other.unlink(missing_ok=True)

    def _fetch(self, data) -> None:
        url = hf_hub_url(self.repository, self.name, revision=self.revision)
        done = data.seek(0, os.SEEK_END)
        http_get(
            url,
            data,
            resume_size=done,
            headers=build_hf_headers(),
            expected_size=self.size,
            displayed_filename=self.name,
        )

    def _check(self, part: Path) -> None:
        """Raise UserError, and delete the part, if its content is not the hub's."""
        if self.sha256 is None:
            return
        digest = hashlib.sha256()
        with part.open("rb") as data:
            while piece := data.read(PIECE):
                digest.update(piece)
        if digest.hexdigest() != self.sha256:
            part.unlink()
            raise UserError(f"{part}: its content is not what the hub says and was deleted; start the download again")
