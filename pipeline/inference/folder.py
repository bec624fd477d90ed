"""An output folder: find existing videos, choose names for new ones, and tidy unfinished ones."""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pipeline.inference.plan import SUFFIX, Job
from pipeline.inference.recipe import TAG, Recipe, read_recipe
from utils.files import fit_name, is_own_file, set_aside
from utils.mp4 import is_complete
from utils.video.file import read_video_metadata
from utils.video.write import partial_paths

log = logging.getLogger("inference")

MOST_PARTIALS = 1000  # unfinished files of one video that are looked for


@dataclass(frozen=True)
class Placement:
    """A video and its file."""

    job: Job
    path: Path
    exists: bool
    """Whether the file is there, whole, and made by the same recipe."""


class _Standing(Enum):
    """The state of a path, compared with the recipe of a video."""

    free = "free"
    same = "same"
    other = "other"
    damaged = "damaged"


class OutputFolder:
    """Gives each job of a run its file.

    A job keeps a whole file that its recipe has made. Otherwise it gets the first free name of: `NAME`; `NAME-seedN`
    if the file `NAME` differs only by its seed; `NAME-HASH`; `NAME-HASH-2` and so on. Upper and lower case count as
    equal, because some file systems ignore the case. A truncated or empty file is set aside.
    """

    def __init__(self, folder: Path) -> None:
        """Read the names in a folder, which must exist."""
        self.folder = folder
        self._names = {_key(name): name for name in os.listdir(folder)}
        self._claimed: set[str] = set()

    def place(self, job: Job) -> Placement:
        """Return the file of a job's video, and whether it exists. A damaged file with that name is set aside."""
        chosen = None
        for count, path in enumerate(self._candidates(job.recipe)):
            standing = self._standing(path, job.recipe)
            if standing is _Standing.same:
                self._claimed.add(_key(path.name))
                return Placement(job, path, exists=True)
            fits = count != 1 or job.recipe.differs_only_by_seed(self._recipe(job.recipe.name + SUFFIX))
            if chosen is None and standing is not _Standing.other and fits:
                chosen = path
            if chosen is not None and count >= 2:
                break
        self._claimed.add(_key(chosen.name))
        if self._standing_on_disk(chosen, job.recipe) is _Standing.damaged:
            name = self._names.pop(_key(chosen.name))
            set_aside(self.folder / name, "is not a whole video", log)
        return Placement(job, chosen, exists=False)

    def _candidates(self, recipe: Recipe) -> Iterator[Path]:
        """Yield the names that a recipe's video may have, in order."""
        hashed = f"-{recipe.digest}"
        numbered = (f"{hashed}-{count}" for count in itertools.count(2))
        endings = itertools.chain(("", f"-seed{recipe.seed}", hashed), numbered)
        return (self.folder / fit_name(recipe.name, f"{ending}{SUFFIX}") for ending in endings)

    def _standing(self, path: Path, recipe: Recipe) -> _Standing:
        if _key(path.name) in self._claimed:
            return _Standing.other
        return self._standing_on_disk(path, recipe)

    def _standing_on_disk(self, path: Path, recipe: Recipe) -> _Standing:
        name = self._names.get(_key(path.name))
        if name is None:
            begun = self._names.get(_key(next(partial_paths(path)).name))
            begun = None if begun is None else read_recipe(self.folder / begun)
            return _Standing.free if begun is None or begun.text == recipe.text else _Standing.other
        file = self.folder / name
        whole = file.is_file() and is_complete(file)
        if whole and read_video_metadata(file).get(TAG) == recipe.text:
            return _Standing.same
        return _Standing.damaged if is_own_file(file) and not whole else _Standing.other

    def _recipe(self, name: str) -> Recipe | None:
        name = self._names.get(_key(name))
        return None if name is None else read_recipe(self.folder / name)


def settle_partials(path: Path, recipe: Recipe, *, finished: bool) -> Path | None:
    """Tidy the unfinished files that this recipe has made of a video, after a run.

    Args:
        path: the video's own file.
        recipe: the recipe of the video. Unfinished files of other recipes are kept.
        finished: whether the video is complete. If it is, all unfinished files are deleted. Otherwise the longest one
            is kept.

    Returns:
        the unfinished file that is kept, `NAME.partial.mp4`, or None.
    """
    own = [file for file in _partials(path) if read_video_metadata(file).get(TAG) == recipe.text]
    longest = max(own, key=lambda file: file.stat().st_size, default=None)
    for file in own:
        if finished or file is not longest:
            file.unlink()
    if finished or longest is None:
        return None
    first = next(partial_paths(path))
    if not os.path.lexists(first):
        longest = longest.rename(first)
    return longest


def _partials(path: Path) -> Iterable[Path]:
    existing = itertools.takewhile(os.path.lexists, partial_paths(path))
    return [file for file in itertools.islice(existing, MOST_PARTIALS) if is_own_file(file)]


def _key(name: str) -> str:
    """Return the form of a name in which file systems compare it that ignore case and Unicode's normal forms."""
    return unicodedata.normalize("NFC", name).casefold()
