"""A folder of numbered items, each with a record and tensors. A writer that was killed can continue.

`about.json` describes the folder. Items are stored in shards: first `shard_N.safetensors` with the tensors, then
`shard_N.json` with the records; N is the first item. Each file appears only when it is complete. A shard is valid when
its .json is there. So any number of processes may write different items of one folder at once.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text, set_aside
from utils.side_files import check_schema, read_json

log = logging.getLogger(__name__)

ABOUT_FILE = "about.json"
MAX_OPEN_FILES = 64
MAX_LISTING = 2**30  # bytes of a shard's records
Listing = dict[Annotated[int, Field(ge=0)], dict[str, Any]]
"""The records of a shard by the numbers of their items."""


class ShardWriter:
    """Adds items to a folder, a shard at a time. A killed process loses only the items of its unfinished shard."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, shard_size: int = 64) -> None:
        """Start or continue `folder`. `about` holds the common properties of all items.

        Raises UserError if the folder has items with other properties, or cannot be written to.
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
        self.stored = {number for path in _listings(self.folder) for number in self._readable(path)}

    def _readable(self, path: Path) -> Listing:
        """Return a listing. A damaged one is set aside, and its items are made again."""
        try:
            return read_json(path, Listing, max_bytes=MAX_LISTING)
        except UserError as error:
            set_aside(path, str(error).removeprefix(f"{path}: "), log)
            return {}

    def remaining(self, items: Iterable[int]) -> list[int]:
        """Return the items that are not stored yet."""
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
        """Write the items added since the last shard as a new shard. Raises UserError if the disk is full."""
        if not self._items:
            return
        stem = f"shard_{min(self._items):08d}"
        tensors = {
            f"{item}.{name}": tensor for item, (_, named) in self._items.items() for name, tensor in named.items()
        }
        listing = {str(item): record for item, (record, _) in self._items.items()}
        try:
            with atomic_path(self.folder / f"{stem}.safetensors") as path:
                save_file(tensors, path)
            atomic_write_text(self.folder / f"{stem}.json", json.dumps(listing, ensure_ascii=False))
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"cannot write {self.folder / stem}.safetensors: {reason}; free space, then run this again to go on"
            ) from error
        self.stored |= self._items.keys()
        self._items = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.flush()  # after an error too, because every added item is complete


class Shards:
    """The items of a folder, in the order of their numbers. Tensors are read only on request."""

    def __init__(self, folder: str | Path, *, key: str, remedy: str, about: type = dict) -> None:
        """Read the records.

        Args:
            folder: the folder to read.
            key: the setting that names the folder, for errors.
            remedy: how to fill the folder, for errors.
            about: the type of the content of `about.json`, which is checked.

        Raises:
            UserError: the folder is empty, or something in it does not fit.
        """
        self.folder = Path(folder)
        self.source = f"{key}={folder}"
        self.remedy = remedy
        listings = [(path, self._readable(path)) for path in _listings(self.folder)]
        found = sorted(
            ((item, path, record) for path, records in listings for item, record in records.items()),
            key=lambda entry: entry[:2],
        )
        if not found:
            raise UserError(f"{self.source}: holds no items; {remedy}")
        self.about: dict[str, Any] = read_json(self.folder / ABOUT_FILE, about)
        self.records: list[dict[str, Any]] = [record for _, _, record in found]
        self._places = [(path.with_suffix(".safetensors"), item) for item, path, _ in found]
        self._open: dict[Path, tuple[Any, frozenset[str]]] = {}

    def _readable(self, path: Path) -> Listing:
        try:
            return read_json(path, Listing, max_bytes=MAX_LISTING)
        except UserError as error:
            raise UserError(f"{self.source}: cannot read {error}: {self.remedy}") from error

    def __len__(self) -> int:
        return len(self.records)

    def prompts(self) -> list[str]:
        """Return every item's prompt. Raises UserError if one has none."""
        return check_schema([record.get("prompt") for record in self.records], list[str], f"{self.source}: the prompts")

    def shape(self, index: int, name: str) -> tuple[int, ...]:
        """Return the shape of tensor `name` of an item, which is not read. Raises UserError if the item has none."""
        with self._file(index) as (file, keys):
            return tuple(file.get_slice(self._key(index, name, keys)).get_shape())

    def read(self, index: int, name: str, *, shape: Sequence[int | None] | None = None) -> Tensor | None:
        """Return tensor `name` of an item. None if there is no such tensor and no `shape` is given.

        Args:
            index: the place of the item, from 0.
            name: the name of the tensor.
            shape: the required shape, checked before the tensor is read; a None in it fits any size. With `shape`, the
                values must be finite floating-point numbers.

        Raises:
            UserError: the file is damaged, or the tensor is missing or does not fit.
        """
        with self._file(index) as (file, keys):
            if shape is None:
                key = f"{self._places[index][1]}.{name}"
                return file.get_tensor(key) if key in keys else None
            key = self._key(index, name, keys)
            found = file.get_slice(key).get_shape()
            if len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape, strict=True)):
                wanted = [size if size is not None else "any" for size in shape]
                raise self._problem(
                    index, f", item {self._places[index][1]}: {name} has the shape {found}, not {wanted}"
                )
            tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise self._problem(
                index, f", item {self._places[index][1]}: {name} has the type {tensor.dtype}, not floating point"
            )
        if not tensor.isfinite().all():
            raise self._misfit(index, f"{name} holds values that are not finite")
        return tensor

    def _key(self, index: int, name: str, keys: frozenset[str]) -> str:
        key = f"{self._places[index][1]}.{name}"
        if key not in keys:
            raise self._misfit(index, f"{name} is missing")
        return key

    @contextmanager
    def _file(self, index: int) -> Iterator[tuple[Any, frozenset[str]]]:
        """Open the file of an item. Yields it with the names in it."""
        path, _ = self._places[index]
        try:
            if path not in self._open:
                if len(self._open) == MAX_OPEN_FILES:
                    self._open.clear()
                file = safe_open(path, framework="pt")
                self._open[path] = file, frozenset(file.keys())
            yield self._open[path]
        except (OSError, SafetensorError) as error:
            raise self._problem(index, f" cannot be read ({str(error).splitlines()[0]})") from error

    def _misfit(self, index: int, text: str) -> UserError:
        return self._problem(index, f", item {self._places[index][1]}: {text}")

    def _problem(self, index: int, text: str) -> UserError:
        path = self._places[index][0]
        return UserError(
            f"{self.source}: {path.name}{text}; delete this file and {path.with_suffix('.json').name}, "
            f"then {self.remedy}"
        )


def _listings(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("shard_*.json"))


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    held = read_json(folder / ABOUT_FILE)
    for name in sorted(held.keys() | about.keys()):
        if held.get(name) != about.get(name):
            raise UserError(
                f"{folder}: was begun with {name}={held.get(name)!r}, not {about.get(name)!r}; "
                "choose another folder, or delete this one"
            )
