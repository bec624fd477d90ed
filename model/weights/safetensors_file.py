"""The header of a .safetensors file."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from model.weights.mapping import SAFETENSORS_DTYPES, Entry
from utils.errors import UserError

SAFETENSORS_ENDINGS = (".safetensors", ".sft")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """Where the tensors lie in a file.

    Raises:
        UserError: the file is truncated, is something else, or holds a type that torch does not have.
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
        raise UserError(f"{path}: holds tensors of the type {min(unknown)}, which cannot be read")
    return {
        name: Entry(SAFETENSORS_DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The free text entries of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
