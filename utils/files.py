"""Files that appear whole or not at all, and names that every file system takes."""

import hashlib
import os
import re
import tempfile
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

WINDOWS_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that becomes `path` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8: readers see the old file or the new one, never a part."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`: readers see the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def safe_stem(text: str, max_length: int = 80) -> str:
    """A file name stem for any text, at most `max_length` bytes long, with no dot and the same on every machine.

    Short lower-case text of letters, digits, spaces and `-_,'` is its own stem. Everything else is cleaned, cut and
    given a hash of the original, so that different texts differ even where the file system ignores case.
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
    """Make the folder if need be and try a file in it; raises UserError if it is a file or cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {error.strerror or error}; choose another") from error
    return path
