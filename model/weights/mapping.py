"""Map the tensors of a file into memory. Only the tensors that are kept use memory, not the whole file."""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WINDOW_BYTES = 128 * 2**20  # smallest piece of a file that is mapped; large files are mapped in MAX_WINDOWS pieces
MAX_WINDOWS = 32


@dataclass(frozen=True)
class Entry:
    """The place of a contiguous tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + torch.Size(self.shape).numel() * self.dtype.itemsize


def map_tensors(path: Path, entries: Mapping[str, Entry]) -> StateDict:
    """Map the tensors of a file copy-on-write, in windows of many tensors.

    The memory of a window is freed with its last tensor. One map of the whole file would keep every page that was read.
    One map for each tensor would need too many file descriptors.
    """
    state: StateDict = {}
    window, start, end = None, 0, 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        window_bytes = max(WINDOW_BYTES, size // MAX_WINDOWS)
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            if entry.end == entry.offset:
                state[name] = torch.empty(entry.shape, dtype=entry.dtype)
                continue
            if window is None or entry.end > end:
                start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
                end = max(entry.end, min(size, start + window_bytes))
                window = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
            flat = torch.frombuffer(
                window, dtype=entry.dtype, count=torch.Size(entry.shape).numel(), offset=entry.offset - start
            )
            state[name] = flat.view(entry.shape)
    return state
