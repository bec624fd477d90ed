"""The only module that reads pickled data. The data cannot run code.

A pickle is a program. Every file that holds one (`.pt`, `.pth`, `.bin`) is read here, and torch accepts only tensors in
plain containers. A test walks the source and fails if another module unpickles.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 256 * 2**20
TORCH_MAGIC = b"\x80\x02"  # torch.save writes protocol 2


def load_torch(path: str | Path) -> Any:
    """Return the content of a `.pt`, `.pth`, `.ckpt` or `.bin` file: tensors on the CPU in plain containers.

    Zip files are memory-mapped, so their tensors cost no memory until they are used.

    Raises:
        UserError: the file holds code, is damaged, or a member of its archive is larger than it declares.
    """
    path = Path(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    is_zip = magic == ZIP_MAGIC  # files from before torch 1.6 are plain pickles and cannot be memory-mapped
    if is_zip:
        _check_archive(path)
    elif magic[:1] == b"\x80" and magic[:2] != TORCH_MAGIC:
        raise UserError(f"{path}: is a Python pickle, which may hold code; refused, nothing was run")
    elif magic[:2] != TORCH_MAGIC:
        raise UserError(f"{path}: is not a PyTorch file (it starts with {magic!r}); download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise UserError(f"{path}: contains pickled code besides tensors; refused, nothing was run") from None
        raise UserError(f"{path}: is not a PyTorch checkpoint or is damaged; download it again") from None
    except Exception as error:  # damaged bytes can raise anything while they are unpickled
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); download it again") from None


def _check_archive(path: Path) -> None:
    """Refuse an archive whose pickles are compressed or too large. torch.save stores them uncompressed."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); download it again") from None
    for member in members:
        if member.file_size > size or member.compress_size > size:
            raise UserError(f"{path}: {member.filename} declares {member.file_size} bytes in a file of {size}; refused")
        if member.compress_type != zipfile.ZIP_STORED and "/data/" in member.filename:
            raise UserError(
                f"{path}: {member.filename} is compressed, and would be read wrongly; save it with torch.save"
            )
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path}: {member.filename} holds more than {MAX_PICKLE_BYTES} bytes; refused")
