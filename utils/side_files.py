"""Readers and writers of the small files beside weights and videos: JSON and JSON lines, checked against a schema.

Such files come from other people, from older versions and from interrupted runs. They are read with a size limit and a
schema, so a bad file gives one clear line and never a traceback.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from utils.errors import UserError
from utils.files import NO_FOLLOW, atomic_write_bytes, fsync_file, is_own_file

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
SHOWN = 60


def read_json(path: str | Path, schema: type[T] = dict, *, max_bytes: int = MAX_BYTES) -> T:
    """Return the content of a JSON file.

    Args:
        path: the file.
        schema: a type, a dataclass or an annotated type that pydantic can check. Keys that a dataclass does not name
            are ignored.
        max_bytes: a larger file is refused before it is read.

    Raises:
        UserError: the file is missing, too large, not JSON, or does not fit. It names the file, the key and the value.
    """
    path = Path(path)
    return parse_json(read_limited(path, max_bytes), schema, str(path))


def parse_json(data: bytes, schema: type[T], source: str) -> T:
    """Parse JSON text as `schema`. `source` names it in errors. Raises UserError like :func:`read_json`."""
    try:
        _check_depth(data)
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise UserError(f"{source}: is not UTF-8 text; make it again or download it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not JSON ({error}); make it again or download it again") from None
    return check_schema(value, schema, source)


def check_schema(value: Any, schema: type[T], source: str) -> T:
    """Check and convert `value` with pydantic. Raises UserError like :func:`read_json`."""
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole content"
        shown = repr(first["input"])
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise UserError(f"{source}: {key} = {shown}: {first['msg']}; correct this value") from None


@functools.lru_cache(maxsize=64)
def _adapter(schema: Any) -> Any:
    """Return pydantic's checker of a schema. It is cached, because making one takes longer than checking a line."""
    return TypeAdapter(schema)


def read_limited(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file of at most `max_bytes`. Raises UserError for anything else."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if (size := path.stat().st_size) > max_bytes:
            raise UserError(
                f"{path}: has {size} bytes, and at most {max_bytes} are read; this cannot be the right file"
            )
        with open(path, "rb") as file:
            return file.read(max_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{_short(path)}: cannot be read: {_reason(error)}") from None


def read_json_lines(
    path: str | Path, schema: type[T] = dict, *, repair: bool = True, max_bytes: int = 2**30
) -> list[T]:
    """Return the records of a JSON-lines file; an empty list if there is no file.

    Incomplete lines (after a crash) and lines that do not fit the schema are left out, with one warning. With `repair`
    they are moved to `NAME.damaged`, and the file is written again without them.
    """
    path = Path(path)
    if not path.exists():
        return []
    good: list[tuple[bytes, T]] = []
    bad: list[bytes] = []
    for line in read_limited(path, max_bytes).split(b"\n"):
        if not line.strip():
            continue
        try:
            good.append((line, parse_json(line, schema, str(path))))
        except UserError:
            bad.append(line)
    if bad:
        _leave_out(path, bad, [line for line, _ in good], repair)
    return [record for _, record in good]


def _leave_out(path: Path, bad: list[bytes], good: list[bytes], repair: bool) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    lines = f"{len(bad)} damaged line{'s' if len(bad) > 1 else ''}"
    if not (repair and is_own_file(path)):
        log.warning("%s: %s ignored", path, lines)
        return
    _append(aside, b"".join(line + b"\n" for line in bad))
    atomic_write_bytes(path, b"".join(line + b"\n" for line in good))
    log.warning("%s: %s set aside in %s", path, lines, aside.name)


def append_json_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record with a single write, so that processes do not mix.

    If a crash has left the last line incomplete, the record begins on a new line. UserError for a symlink.
    """
    _append(Path(path), json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not is_own_file(path):
        raise UserError(f"{path}: is a link or a folder, so it is not written; move it away")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_FOLLOW, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(28, "No space left on device")
    finally:
        os.close(descriptor)
    fsync_file(path)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(data: bytes) -> None:
    depth = deepest = 0
    quoted = escaped = False
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    for byte in data:
        if quoted:
            quoted = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    if deepest > MAX_DEPTH:
        raise ValueError(f"nested {deepest} levels deep")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
