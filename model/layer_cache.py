"""The cached keys and values of one transformer layer, and the slots that a chunk of frames writes and reads.

Shapes: B batch, F frames of a chunk, T tokens a frame, N heads, D head dim, S visible keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import FrameRange
from model.eight_bits import FP8, to_fp8
from model.rope import apply_rotary


class CacheDtype(Enum):
    """How the KV cache stores keys and values."""

    auto = "auto"
    """The dtype in which the denoiser computes."""
    fp8 = "fp8"
    """8-bit floats with a scale for every head and token. They take about half the memory of bfloat16. Every pass
    converts what it reads."""


class KeyLayout(NamedTuple):
    """The shape and storage of the keys, the same in every layer."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    static: bool = False
    """True for compiled passes. Slot numbers are then tensors, and buffers keep their addresses for CUDA graphs."""

    @classmethod
    def of(cls, k: Tensor) -> KeyLayout:
        """Return the layout of keys [B F T N D]."""
        return cls(k.shape[0], *k.shape[2:], k.dtype, k.device)

    @torch.inference_mode(False)
    def zeros(self, frames: int, dtype: torch.dtype, head_dim: int | None = None) -> Tensor:
        """Return a tensor [B frames T N D] of zeros. Passes in inference mode and others may write to it."""
        shape = self.batch, frames, self.tokens, self.num_heads, self.head_dim if head_dim is None else head_dim
        buffer = torch.zeros(shape, dtype=dtype, device=self.device)
        if self.static:
            torch._dynamo.mark_static_address(buffer)
        return buffer


@dataclass(frozen=True)
class ChunkSlots:
    """The slots of one chunk. They are known before the pass and are the same in every layer."""

    start_frame: int
    frames: int
    visible: tuple[FrameRange, ...]
    """The slots that the chunk attends to, its own included."""
    writes: tuple[tuple[int, int, int], ...]
    """The slots that the chunk fills, as runs (first slot, first frame within the chunk, frames)."""
    index: Tensor | None
    """The same slots as a tensor [F], for compiled passes: one graph then serves every position."""
    sink: int
    """The number of frames in the sink."""
    sink_made: FrameRange
    """The frames of the sink that belong to this chunk."""
    sink_shift: Tensor | None
    """The rotation that moves the sink's keys with the window (see :func:`model.rope.shift_table`); None: no move."""
    keep_graph: bool = False
    """True if a pass under grad writes the chunk and keeps its autograd graph, so that later chunks' gradient reaches
    it."""


@dataclass(frozen=True)
class FrameBuffer:
    """The keys or values of several frames, in the dtype of the denoiser or in 8 bits."""

    data: Tensor
    """[B slots T N D]."""
    scale: Tensor | None
    """[B slots T N 1] for 8-bit data."""
    live: dict[int, Tensor | None] = field(default_factory=dict)
    """Frames [B 1 T N D] with their autograd graph, by slot. ``data`` holds the same values. None: already dropped."""

    @classmethod
    def empty(cls, layout: KeyLayout, frames: int, fp8: bool) -> FrameBuffer:
        """Make a buffer of ``frames`` slots."""
        if not fp8:
            return cls(layout.zeros(frames, layout.dtype), None)
        return cls(layout.zeros(frames, FP8), layout.zeros(frames, torch.float32, head_dim=1))

    def read(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Return the slots [low, high): a view, or a new tensor if the data has 8 bits."""
        part = self.data[:, low:high]
        return part if self.scale is None else (part.float() * self.scale[:, low:high]).to(dtype)

    def context(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Return the slots [low, high) for a pass under grad. Only frames that were kept with their graph have one."""
        if not self.live:
            return self.read(low, high, dtype).detach()
        frames = []
        for slot in range(low, high):
            frame = self.live.get(slot)
            frames.append(self.read(slot, slot + 1, dtype).detach() if frame is None else frame)
        return torch.cat(frames, dim=1)

    def keep(self, x: Tensor, chunk: ChunkSlots) -> None:
        """Write the frames x [B F T N D] of a chunk and keep their graph. A recomputed pass changes nothing."""
        if chunk.start_frame not in self.live:
            self.write(x.detach(), chunk)
            self.live.update(enumerate(x.split(1, dim=1), chunk.start_frame))

    def drop_graph(self) -> None:
        """Drop the graph of every frame. Passes recomputed in backward need only the values."""
        self.live.update(dict.fromkeys(self.live))

    def write(self, x: Tensor, chunk: ChunkSlots) -> None:
        """Write the frames x [B F T N D] of a chunk into its slots."""
        data, scale = (x, None) if self.scale is None else to_fp8(x)
        self._fill(self.data, data, chunk)
        if scale is not None:
            self._fill(self.scale, scale, chunk)

    def write_at(self, slot: int, x: Tensor) -> None:
        """Write frames x [B F T N D] into consecutive slots."""
        data, scale = (x, None) if self.scale is None else to_fp8(x)
        self.data[:, slot : slot + x.shape[1]] = data
        if scale is not None:
            self.scale[:, slot : slot + x.shape[1]] = scale

    def copy_from(self, other: FrameBuffer, frames: int) -> None:
        """Copy the first ``frames`` slots of another buffer of the same kind."""
        self.data[:, :frames] = other.data[:, :frames]
        if self.scale is not None:
            self.scale[:, :frames] = other.scale[:, :frames]
        self.live.update({slot: frame for slot, frame in other.live.items() if slot < frames})

    @staticmethod
    def _fill(buffer: Tensor, x: Tensor, chunk: ChunkSlots) -> None:
        if chunk.index is not None:
            if x.dtype == FP8:  # index_copy_ does not support 8-bit floats
                buffer, x = buffer.view(torch.uint8), x.view(torch.uint8)
            buffer.index_copy_(1, chunk.index, x)
            return
        for slot, first, frames in chunk.writes:
            buffer[:, slot : slot + frames] = x[:, first : first + frames]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of the frames that one layer has seen."""

    k: FrameBuffer
    v: FrameBuffer
    sink: Tensor | None
    """The original keys of the sink [B sink T N D]. The buffer ``k`` holds a copy that moves with the window."""

    @classmethod
    def empty(cls, layout: KeyLayout, frames: int, *, sink: int, fp8: bool) -> LayerCache:
        """Make buffers of ``frames`` slots. The keys of the first ``sink`` frames move with the window."""
        unmoved = layout.zeros(sink, layout.dtype) if sink else None
        return cls(FrameBuffer.empty(layout, frames, fp8), FrameBuffer.empty(layout, frames, fp8), unmoved)

    @property
    def slots(self) -> int:
        """The number of frames that the buffers hold."""
        return self.k.data.shape[1]

    def extend(self, k: Tensor, v: Tensor, chunk: ChunkSlots) -> tuple[Tensor, Tensor]:
        """Join the keys and values [B F T N D] of a chunk to those it attends to: two tensors [B S N D].

        The keys are already rotated. Without grad they are written to the buffers. The result is then a view of the
        buffers if the visible slots are contiguous. Under grad the result is a new tensor. Its context part is
        detached, and nothing is written, unless a chunk keeps its graph.
        """
        if torch.is_grad_enabled():
            joined = self._join(self.k, k, chunk, chunk.sink_shift), self._join(self.v, v, chunk)
            if chunk.keep_graph:
                self.k.keep(k, chunk)
                self.v.keep(v, chunk)
            return joined
        self.k.write(k, chunk)
        self.v.write(v, chunk)
        shift = chunk.sink_shift
        if self.sink is not None:
            self._place_sink(k, chunk)
            shift = None
        return self._visible(self.k, chunk, k.dtype, shift), self._visible(self.v, chunk, v.dtype)

    def forget_graph(self, start_frame: int, end: int) -> None:
        """Forget the graph of frames that are about to be written anew."""
        for slot in range(start_frame, end):
            self.k.live.pop(slot, None)
            self.v.live.pop(slot, None)

    def read(self, chunk: ChunkSlots, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values that a chunk attends to, once its own are in their slots: two tensors [B S N D]."""
        return self._visible(self.k, chunk, dtype), self._visible(self.v, chunk, dtype)

    def _place_sink(self, k: Tensor, chunk: ChunkSlots) -> None:
        """Keep the original keys of the sink, and write them to the buffer at their present positions."""
        low, high = chunk.sink_made
        if low < high:
            self.sink[:, low:high] = k[:, : high - low]
        if chunk.sink_shift is not None:
            self.k.write_at(0, apply_rotary(self.sink, chunk.sink_shift))

    def _visible(
        self, buffer: FrameBuffer, chunk: ChunkSlots, dtype: torch.dtype, shift: Tensor | None = None
    ) -> Tensor:
        parts = [_shifted(buffer.read(low, high, dtype), low, shift) for low, high in chunk.visible]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)

    def _join(self, buffer: FrameBuffer, live: Tensor, chunk: ChunkSlots, shift: Tensor | None = None) -> Tensor:
        start = chunk.start_frame
        context = [
            _shifted(buffer.context(low, min(high, start), live.dtype), low, shift)
            for low, high in chunk.visible
            if low < start
        ]
        if buffer.scale is not None:  # round as inference does; gradients pass through the rounding
            data, scale = to_fp8(live.detach())
            live = live + ((data.float() * scale).to(live.dtype) - live.detach())
        return torch.cat([*context, live], dim=1).flatten(1, 2)


def _shifted(part: Tensor, low: int, shift: Tensor | None) -> Tensor:
    """Return the frames from slot ``low`` on. ``shift`` moves the keys of the sink, which begins at slot 0."""
    return apply_rotary(part, shift) if shift is not None and low == 0 else part


@dataclass
class LayerBuffers:
    """The caches of all layers. They may outlive a :class:`model.kv_cache.KVCache` and serve the next one."""

    layers: list[LayerCache] = field(default_factory=list)
    layout: KeyLayout | None = None
    fp8: bool = False
    sink: int = 0
    """The frames whose keys move with the window."""

    def fit(self, num_layers: int, layout: KeyLayout, frames: int, *, fp8: bool, sink: int) -> bool:
        """Return whether they can hold ``frames`` frames of a layout in every layer."""
        same = (len(self.layers), self.layout, self.fp8, self.sink) == (num_layers, layout, fp8, sink)
        return same and self.layers[0].slots >= frames

    def free(self) -> None:
        """Drop what is kept."""
        self.layers = []

    def keep(self, layers: list[LayerCache], layout: KeyLayout, *, fp8: bool, sink: int) -> None:
        """Keep the caches of all layers for the next :class:`model.kv_cache.KVCache`."""
        self.layers, self.layout, self.fp8, self.sink = layers, layout, fp8, sink
