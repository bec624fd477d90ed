"""The files of one checkpoint: written with checksums, verified before they are read. No file can run code.

A checkpoint folder holds

- ``rank_00000.safetensors``, ``rank_00001.safetensors``, …: the tensors, each file from one process. Its header says
  which rows of the whole tensor it holds, so any number of processes can read it;
- ``state.json``: everything that is not a tensor;
- ``manifest.json``: the mark of this program, the step, and size and CRC-32 of every other file. It is written last.

CRC-32 finds every single changed bit and every burst of up to 32 bits. Verifying reads each file once (about 1.5 GB/s
on one core of a laptop); the processes of a job share the files out.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.distributed import Ranks

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
FORMAT = "self-forcing checkpoint 1"
TENSOR_FILE = re.compile(r"rank_\d{5,}\.safetensors")
ROWS = "rows"
READ_BYTES = 8 * 2**20
MANIFEST_BYTES = 64 * 2**20
STATE_BYTES = 256 * 2**20

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class DamagedCheckpoint(Exception):
    """A checkpoint differs from what was written. The message is one line that names the file."""


@dataclass(frozen=True)
class Checksum:
    """The expected size and content of a file."""

    bytes: int
    """Its size."""
    crc32: int
    """CRC-32 of its content."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    files: dict[str, Checksum]
    """Every other file of the checkpoint, by name."""


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor [N ...] that one process holds. For a scalar, every process holds the whole tensor."""

    local: Tensor
    """Rows [n ...]."""
    start: int
    """Number of the first row in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    is_copy: bool
    """True if another process writes the same rows."""


@dataclass(frozen=True)
class StoredPart:
    """Consecutive rows of a tensor in one file."""

    file: str
    start: int
    count: int
    """Number of rows; 1 for a tensor without rows."""


@dataclass(frozen=True)
class StoredTensor:
    """The facts about one tensor in the headers of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[StoredPart]


def rows_of(tensor: Tensor, rank: int) -> Rows:
    """Return the part of a tensor that this process holds.

    Raises:
        ValueError: the tensor is sharded along another dimension than the first.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Rows(tensor.detach(), 0, shape, is_copy=rank != 0)
    place = tensor.device_mesh.get_coordinate()
    sharded = [axis for axis, placement in enumerate(tensor.placements) if placement == Shard(0)]
    replicated = [axis for axis, placement in enumerate(tensor.placements) if placement == Replicate()]
    if len(sharded) > 1 or len(sharded) + len(replicated) < len(place):
        raise ValueError(f"placements={tensor.placements} are not supported: shard the first dimension only")
    start = 0
    if sharded:
        ways = tensor.device_mesh.size(sharded[0])
        start = min(shape[0], place[sharded[0]] * math.ceil(shape[0] / ways))
    return Rows(tensor.detach().to_local(), start, shape, is_copy=any(place[axis] for axis in replicated))


def tensor_file(rank: int) -> str:
    """Return the name of the file that a process writes."""
    return f"rank_{rank:05d}.safetensors"


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Checksum:
    """Write bytes-like `chunks`, flush them to the disk and return their checksum."""
    size, checksum = 0, 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
        file.flush()
        os.fsync(file.fileno())
    return Checksum(size, checksum)


def write_tensors(path: Path, parts: Mapping[str, Rows]) -> Checksum:
    """Write the rows that this process holds as a .safetensors file, one tensor after the other."""
    ordered = sorted(parts.items(), key=lambda item: -item[1].local.element_size())  # keeps every tensor aligned
    rows = {name: [part.start, *part.shape] for name, part in ordered}
    header: dict[str, Any] = {"__metadata__": {ROWS: json.dumps(rows)}}
    offset = 0
    for name, part in ordered:
        end = offset + part.local.numel() * part.local.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[part.local.dtype],
            "shape": list(part.local.shape),
            "data_offsets": [offset, end],
        }
        offset = end

    def chunks() -> Iterator[bytes | memoryview]:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, part in ordered:
            yield memoryview(part.local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return write_file(path, chunks())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    write_file(folder / MANIFEST_FILE, [_manifest_text(manifest).encode()])


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        DamagedCheckpoint: the file is missing, or differs from the output of :func:`write_manifest`.
    """
    path = folder / MANIFEST_FILE
    try:
        text = _read_own_file(path, MANIFEST_BYTES).decode()
        values = json.loads(text)
        files = {name: Checksum(**checksum) for name, checksum in values["files"].items()}
        manifest = Manifest(values["step"], files)
        is_exact = _manifest_text(manifest) == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_exact = False
    if not is_exact:
        raise DamagedCheckpoint(f"{path.name} is damaged")
    for name in manifest.files:
        if name != STATE_FILE and not TENSOR_FILE.fullmatch(name):
            raise DamagedCheckpoint(f"{path.name} lists {name!r}, which is no file of a checkpoint")
    return manifest


def verify(folder: Path, manifest: Manifest, ranks: Ranks = Ranks()) -> None:  # noqa: B008, frozen
    """Compare this process's share of the files with the manifest.

    Raises:
        DamagedCheckpoint: a file is missing, or has another size or content.
    """
    if STATE_FILE not in manifest.files:
        raise DamagedCheckpoint(f"{MANIFEST_FILE} does not list {STATE_FILE}")
    for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
        path, expected = folder / name, manifest.files[name]
        if (size := _size(path)) != expected.bytes:
            held = f"has {size} bytes" if size >= 0 else "is missing"
            raise DamagedCheckpoint(f"{name} {held}, but {expected.bytes} bytes were written")
        try:
            with open(path, "rb") as file:
                checksum = 0
                while chunk := file.read(READ_BYTES):
                    checksum = zlib.crc32(chunk, checksum)
        except OSError as error:
            raise DamagedCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error
        if checksum != expected.crc32:
            raise DamagedCheckpoint(f"{path.name} has changed since it was written (its CRC-32 differs)")


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json`.

    Raises:
        DamagedCheckpoint: the file is missing or does not contain a JSON object.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(_read_own_file(path, STATE_BYTES))
        is_whole = isinstance(state["step"], int) and isinstance(state["values"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise DamagedCheckpoint(f"{path.name} is damaged")
    return state


def stored_tensors(folder: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Return name, shape and place of every tensor, from the headers only.

    Raises:
        DamagedCheckpoint: a header is wrong: the parts do not form the tensor that it describes.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(manifest.files) - {STATE_FILE}):
        with _opened(folder / file) as tensors:
            rows = json.loads(tensors.metadata()[ROWS])
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                part = tensors.get_slice(name)
                start, *shape = map(int, rows[name])
                held, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                stored = found.setdefault(name, StoredTensor(tuple(shape), dtype, []))
                if stored.shape[1:] != held[1:] or len(stored.shape) != len(held) or stored.dtype != dtype:
                    raise DamagedCheckpoint(f"{file}: {name} has shape {held}, not rows of {stored.shape}")
                stored.parts.append(StoredPart(file, start, held[0] if held else 1))
    for name, stored in found.items():
        _check_complete(name, stored)
    return found


def read_tensors_into(folder: Path, stored: Mapping[str, StoredTensor], targets: Mapping[str, Rows]) -> None:
    """Read rows into `targets`, by name. Every file is opened once.

    Raises:
        DamagedCheckpoint: a file cannot be read.
    """
    by_file: dict[str, list[tuple[str, StoredPart]]] = {}
    for name in targets:
        for part in stored[name].parts:
            by_file.setdefault(part.file, []).append((name, part))
    for file, parts in by_file.items():
        with _opened(folder / file) as tensors:
            for name, part in parts:
                _read_part(tensors, name, part, targets[name])


def _read_part(tensors: Any, name: str, part: StoredPart, target: Rows) -> None:
    """Copy the rows that are in both a part of an open file and `target`."""
    if not target.shape:
        target.local.copy_(tensors.get_tensor(name))
        return
    first, end = max(part.start, target.start), min(part.start + part.count, target.start + target.local.shape[0])
    if first < end:
        rows = tensors.get_slice(name)[first - part.start : end - part.start]
        target.local[first - target.start : end - target.start].copy_(rows)


def _manifest_text(manifest: Manifest) -> str:
    """Return the text of a manifest. Its own CRC-32 is that of the same text with 0 instead of the CRC-32."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "step": manifest.step,
        "files": {name: vars(checksum) for name, checksum in sorted(manifest.files.items())},
        "crc32": 0,
    }
    values["crc32"] = zlib.crc32(json.dumps(values, indent=1).encode())
    return json.dumps(values, indent=1) + "\n"


def _check_complete(name: str, stored: StoredTensor) -> None:
    """Check that the parts form the whole tensor. So no header can ask for more memory than its file has."""
    end = 0
    for part in sorted(stored.parts, key=lambda part: (part.start, part.count)):
        if part.start != end:
            break
        end += part.count
    if end != (stored.shape[0] if stored.shape else 1):
        raise DamagedCheckpoint(f"the parts of {name} do not make up a tensor of shape {stored.shape}")


class _opened:
    """An open .safetensors file. Every error in it becomes a DamagedCheckpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{self.path.name} cannot be read: {error}") from error
        return self._file.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self._file.__exit__(kind, error, traceback)
        if isinstance(error, (SafetensorError, KeyError, TypeError, ValueError, RecursionError)):
            raise DamagedCheckpoint(f"{self.path.name} cannot be read: {error}") from error


def _read_own_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Symbolic links are not followed."""
    size = _size(path)
    if not 0 <= size <= limit:
        raise DamagedCheckpoint(
            f"{path.name} is missing" if size < 0 else f"{path.name} has {size} bytes, more than {limit}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error


def _size(path: Path) -> int:
    """Return the bytes of a regular file; -1 if it is missing or not a regular file."""
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
    except OSError:
        return -1
