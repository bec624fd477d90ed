"""The header of a .safetensors file."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from model.weights.mapping import SAFETENSORS_DTYPES, Entry
from utils.errors import UserError

SAFETENSORS_ENDINGS = (".safetensors", ".sft")


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a safetensors file."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """Return tensor name -> its place in the file.

    Raises:
        UserError: the file is truncated, has another format, or holds a type that torch does not have.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if unknown := {tensor["dtype"] for tensor in header.values()} - SAFETENSORS_DTYPES.keys():
        raise UserError(f"{path}: holds tensors of the type {min(unknown)}, which cannot be read; use another file")
    return {
        name: Entry(SAFETENSORS_DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file: texts by name."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
