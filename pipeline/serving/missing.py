"""Published weights that are not on this machine, as the page tells of them. It does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class MissingFile:
    """A file that can be downloaded."""

    path: str
    """Where it will be on this machine."""
    bytes: int
    """What is still to come; an earlier download may have left a part."""


class MissingWeights(UserError):
    """The weights of a model are published, but not all of them are here.

    Args:
        message: one line for a person.
        files: the missing files. Empty if the hub did not answer, so that they are not known.
    """

    def __init__(self, message: str, files: Sequence[MissingFile] = ()) -> None:
        super().__init__(message)
        self.files = tuple(files)

    def describe(self) -> dict[str, Any]:
        """Return what a client may see."""
        total = sum(file.bytes for file in self.files) if self.files else None
        return {"message": str(self), "files": [vars(file) for file in self.files], "bytes": total}
