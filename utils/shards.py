"""A folder of numbered items, each a record and some tensors, that a killed writer can go on with.

`about.json` says what the folder holds. Items are stored in shards: `shard_N.safetensors` with the tensors and then
`shard_N.json` with the records, N the first item in it. Both appear whole or not at all, and a shard counts once its
.json is there; so any number of processes may write different items of one folder at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text

ABOUT_FILE = "about.json"
MAX_OPEN_FILES = 64


class ShardWriter:
    """Adds items to a folder, a shard at a time; a killed process loses the items of its unfinished shard only."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, shard_size: int = 64) -> None:
        """Start or continue `folder`; `about` is what every item has in common.

        Raises UserError if the folder holds items that are about something else, or cannot be written to.
        """
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} must be at least 1")
        self.folder = Path(folder)
        self.shard_size = shard_size
        self._items: dict[int, tuple[Mapping[str, Any], dict[str, Tensor]]] = {}
        about = json.loads(json.dumps(dict(about)))
        try:
            if (self.folder / ABOUT_FILE).is_file():
                _check_same(self.folder, about)
            else:
                atomic_write_text(self.folder / ABOUT_FILE, json.dumps(about, ensure_ascii=False, indent=1))
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
        self.stored = {number for path in _listings(self.folder) for number in _read_listing(path)}

    def remaining(self, items: Iterable[int]) -> list[int]:
        """Which of the items are not stored yet."""
        return [item for item in items if item not in self.stored]

    def add(self, item: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Add an item: a JSON-ready record and tensors of any shapes, by name."""
        if item in self.stored or item in self._items:
            raise ValueError(f"item {item} is already in {self.folder}")
        # copies: rows of one batch share their memory, which a file of tensors cannot
        self._items[item] = record, {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        if len(self._items) == self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write the items added since the last shard as one more."""
        if not self._items:
            return
        stem = f"shard_{min(self._items):08d}"
        tensors = {
            f"{item}.{name}": tensor for item, (_, named) in self._items.items() for name, tensor in named.items()
        }
        with atomic_path(self.folder / f"{stem}.safetensors") as path:
            save_file(tensors, path)
        listing = {str(item): record for item, (record, _) in self._items.items()}
        atomic_write_text(self.folder / f"{stem}.json", json.dumps(listing, ensure_ascii=False))
        self.stored |= self._items.keys()
        self._items = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.flush()  # after an error too: every item added is whole


class Shards:
    """The items of a folder, in the order of their numbers; tensors are read when asked for."""

    def __init__(self, folder: str | Path, *, key: str, remedy: str) -> None:
        """Read the records. `key` names the setting that holds the folder and `remedy` what fills it, for errors.

        Raises UserError if there is nothing to read.
        """
        self.folder = Path(folder)
        self.source = f"{key}={folder}"
        self.remedy = remedy
        listings = [(path, _read_listing(path)) for path in _listings(self.folder)]
        found = sorted((item, path, record) for path, records in listings for item, record in records.items())
        if not found:
            raise UserError(f"{self.source}: holds no items; {remedy}")
        self.about: dict[str, Any] = _read_json(self.folder / ABOUT_FILE)
        self.records: list[dict[str, Any]] = [record for _, _, record in found]
        self._places = [(path.with_suffix(".safetensors"), item) for item, path, _ in found]
        self._open: dict[Path, tuple[Any, frozenset[str]]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int, name: str) -> Tensor | None:
        """Tensor `name` of an item, None if the item has none of that name."""
        path, item = self._places[index]
        key = f"{item}.{name}"
        try:
            if path not in self._open:
                if len(self._open) == MAX_OPEN_FILES:
                    self._open.clear()
                file = safe_open(path, framework="pt")
                self._open[path] = file, frozenset(file.keys())
            file, keys = self._open[path]
            return file.get_tensor(key) if key in keys else None
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.source}: {path.name} cannot be read ({str(error).splitlines()[0]}); delete it and "
                f"{path.with_suffix('.json').name}, then {self.remedy}"
            ) from error


def _listings(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("shard_*.json"))


def _read_listing(path: Path) -> dict[int, dict[str, Any]]:
    return {int(item): record for item, record in _read_json(path).items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); make the folder anew") from error


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    held = _read_json(folder / ABOUT_FILE)
    for name in sorted(held.keys() | about.keys()):
        if held.get(name) != about.get(name):
            raise UserError(
                f"{folder}: was begun with {name}={held.get(name)!r}, not {about.get(name)!r}; "
                "choose another folder, or delete this one"
            )
