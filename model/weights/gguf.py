"""Read GGUF files, as city96's ComfyUI-GGUF writes them for Wan and UMT5. The package `gguf` unpacks their tensors.

Layout (ggml/docs/gguf.md): magic, version, counts, key-value pairs, tensor entries, padding, data.
"""

import math
import struct
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.weights.mapping import Entry, StateDict, map_tensors
from model.weights.packed import PackedTensor
from utils.errors import UserError

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # GGUF has 4 axes at most; the 3D convolution has 5
MAX_HEADER_BYTES = 64 * 2**20
MAX_ITEMS = 2**20
SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {0: torch.float32, 1: torch.float16, 24: torch.int8, 30: torch.bfloat16}


def load_gguf(source: Path | str) -> ModuleType:
    """Import the package gguf. Raises UserError that names `source` if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{source}: is a GGUF file; install the reader with: pip install gguf") from None
    return gguf


def read_gguf(path: Path) -> StateDict:
    """Return the tensors of a GGUF file, memory-mapped. A quantised tensor is unpacked when it is used.

    Raises:
        UserError: the package `gguf` is missing, or the file is damaged or in a format that cannot be unpacked.
    """
    gguf = load_gguf(path)
    with path.open("rb") as file:
        header = _Header(file.read(MAX_HEADER_BYTES), path)
    fields, tensors, start = header.read()
    entries, kinds = {}, {}
    for name, (shape, kind, offset) in tensors.items():
        if kind in PLAIN:
            entries[name] = Entry(PLAIN[kind], shape, start + offset)
        else:
            try:
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise UserError(f"{path}: {name!r} has the unknown type {kind}; use another quantisation") from None
            if shape[-1] % block:
                raise UserError(
                    f"{path}: {name!r} has rows of {shape[-1]} values, no multiple of {block}; use another file"
                )
            entries[name] = Entry(torch.uint8, (*shape[:-1], shape[-1] // block * size), start + offset)
            kinds[name] = gguf.GGMLQuantizationType(kind)
        if entries[name].end > path.stat().st_size:
            raise UserError(f"{path}: is truncated: {name!r} lies beyond the end of the file; download it again")
    state = map_tensors(path, entries)
    for name, kind in kinds.items():
        state[name] = _packed(state[name], kind, tensors[name][0], f"{path}: {name!r}")
    return {name: _in_shape(tensor, fields.get(f"{ORIGINAL_SHAPE}{name}"), path) for name, tensor in state.items()}


def _packed(stored: Tensor, kind: Any, shape: tuple[int, ...], name: str) -> PackedTensor:
    dequantize = load_gguf(name).quants.dequantize

    def read() -> Tensor:
        return torch.from_numpy(np.array(dequantize(stored.numpy(), kind), dtype=np.float32)).view(shape)

    try:
        dequantize(stored.view(-1, stored.shape[-1])[:1].numpy(), kind)
    except NotImplementedError:
        raise UserError(f"{name} is in the format {kind.name}, which cannot be unpacked; use another file") from None
    return PackedTensor(shape, (stored,), read)


def _in_shape(tensor: Tensor, shape: Any, path: Path) -> Tensor:
    if shape is None:
        return tensor
    sizes = shape if isinstance(shape, list) else [None]
    if not all(type(size) is int and size > 0 for size in sizes) or math.prod(sizes) != tensor.numel():
        raise UserError(
            f"{path}: the shape {str(shape)[:60]} does not fit a tensor {tuple(tensor.shape)}; the file is damaged"
        )
    if isinstance(tensor, PackedTensor):
        return PackedTensor(tuple(shape), tensor.stored, partial(_read_as, tensor, tuple(shape)))
    return tensor.view(shape)


def _read_as(tensor: PackedTensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.read().view(shape)


class _Header:
    """A cursor over the header of a file. It reads nothing beyond the end of the data."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
        """Return the fields, the tensors (shape, type, offset) and the position at which the data begin."""
        try:
            magic, version, tensors, fields = self.take("4sIQQ")
            if magic != MAGIC or version not in (2, 3) or max(tensors, fields) > MAX_ITEMS:
                raise UserError(f"{self.path}: GGUF version {version} with {tensors} tensors cannot be read")
            values = dict(self._field() for _ in range(fields))
            entries = dict(self._tensor() for _ in range(tensors))
            alignment = values.get("general.alignment", 32)
            return values, entries, self.at + -self.at % alignment
        except (struct.error, UnicodeDecodeError, KeyError, TypeError, ZeroDivisionError, OverflowError):
            raise UserError(f"{self.path}: truncated or damaged GGUF file; download it again") from None

    def take(self, code: str) -> tuple:
        values = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return values

    def _text(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.data) - self.at:
            raise struct.error
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _field(self) -> tuple[str, Any]:
        name = self._text()
        (kind,) = self.take("I")
        return name, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])[0]
        inner, count = self.take("IQ")
        if inner == ARRAY or count > len(self.data) - self.at:
            raise struct.error
        return [self._text() for _ in range(count)] if inner == STRING else list(self.take(f"{count}{SCALARS[inner]}"))

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._text()
        (axes,) = self.take("I")
        if not 1 <= axes <= 4:
            raise struct.error
        shape = self.take(f"{axes}Q")[::-1]  # the innermost axis comes first
        kind, offset = self.take("IQ")
        if not 0 < math.prod(shape) <= 2**48:
            raise struct.error
        return name, (tuple(shape), kind, offset)
