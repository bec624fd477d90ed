"""Files that appear only when they are complete, and names that every file system accepts."""

import errno
import hashlib
import itertools
import logging
import os
import re
import stat
import tempfile
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

LONGEST_NAME = 255  # bytes, on almost every file system
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
WINDOWS_FORBIDDEN = '<>:"/\\|?*'
WINDOWS_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix.

    On success it is renamed to `path`. On failure it is deleted.
    When the block ends, the content and the new name are on the disk (fsync). A symlink at `path` is replaced, never
    followed. The temporary name cannot be guessed, so nobody can put a symlink there first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8. A reader sees the old file or the new one, never a part."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`. A reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def fsync_file(path: str | Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: str | Path) -> None:
    """Wait until the names in a folder are on the disk. It is no error if the file system does not support this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def is_own_file(path: str | Path) -> bool:
    """Return whether `path` is a regular file and not a symlink, so that it cannot lead out of its folder."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def fit_name(stem: str, ending: str) -> str:
    """Return `stem` + `ending`, with the stem cut so that a file system can hold the name."""
    room = LONGEST_NAME - len(ending.encode())
    return stem.encode(errors="surrogateescape")[:room].decode(errors="ignore") + ending


def set_aside(path: str | Path, reason: str, log: logging.Logger) -> Path:
    """Rename a damaged file or folder to `NAME.damaged` (`.damaged-2`, ... if that exists) and return the new path.

    One warning names the old path, the new path and the reason. Nothing is deleted.
    """
    path = Path(path)
    for count in itertools.count(1):
        aside = path.with_name(fit_name(path.name, ".damaged" + (f"-{count}" if count > 1 else "")))
        if not os.path.lexists(aside):
            break
    os.rename(path, aside)
    log.warning("%s: %s; it was set aside as %s", path, reason, aside.name)
    return aside


def exact_stem(text: str, max_length: int) -> str:
    """Return `text` itself if it can be the beginning of a file name, else :func:`safe_stem` of it.

    It can if it is at most `max_length` bytes of UTF-8 and holds no character that file names cannot have, no control
    character and no dot at the beginning, which would hide the file.
    """
    try:
        fits = 0 < len(text.encode()) <= max_length
    except UnicodeEncodeError:
        fits = False
    forbidden = WINDOWS_FORBIDDEN if os.name == "nt" else "/"
    printable = all(unicodedata.category(c) not in ("Cc", "Zl", "Zp") and c not in forbidden for c in text)
    if fits and printable and not text.startswith(".") and text == text.strip():
        return text
    return safe_stem(text, max(16, min(max_length, 80)))


def safe_stem(text: str, max_length: int = 80) -> str:
    """Return a file name stem for any text: at most `max_length` bytes, with no dot, the same on every machine.

    Short lower-case text of letters, digits, spaces and `-_,'` is its own stem. Other text is cleaned, cut and given a
    hash of the original. So different texts differ even if the file system ignores case.

    Raises:
        ValueError: `max_length` is below 16, which leaves no room for the hash.
    """
    if max_length < 16:
        raise ValueError(f"max_length={max_length} leaves no room for a hash: give at least 16")
    kept = (
        c if c in " -_,'" or unicodedata.category(c)[0] in "LMN" else "_" for c in unicodedata.normalize("NFC", text)
    )
    stem = re.sub(r"_{2,}", "_", "".join(kept)).strip(" -_") or "untitled"
    is_own_stem = stem == text == text.casefold() and len(stem.encode()) <= max_length
    if is_own_stem and not WINDOWS_RESERVED.fullmatch(stem):
        return stem
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    cut = stem.encode()[: max_length - len(digest) - 1].decode(errors="ignore").rstrip(" -_")
    return f"{cut}-{digest}"


def ensure_writable_folder(path: str | Path) -> Path:
    """Make the folder if it is missing, and test it with a file. UserError if it is a file or cannot be written to."""
    if not str(path).strip():
        raise UserError("the name of the folder to write to is empty; give one")
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # ValueError: characters that no file system has in a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to the folder {path}: {reason}; choose another") from error
    return path
