"""The KV cache of causal generation: committed context, rolling window, attention sink, text keys and values.

Shapes: B batch, F frames of a chunk, T tokens a frame, N heads, D head dim, S keys that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import FrameRange, visible_frames
from model.rope import apply_rotary, shift_table

KeyValue = tuple[Tensor, Tensor]


class CachedText(NamedTuple):
    """Keys and values [B L N D] of a prompt in one layer, and what to add to their logits, [B 1 1 L] or nothing."""

    k: Tensor
    v: Tensor
    bias: Tensor | None

    @classmethod
    def batch(cls, texts: Sequence[CachedText]) -> CachedText:
        """Those of several prompts as one batch; the shorter are filled up with keys that nothing sees."""
        longest = max(text.k.shape[1] for text in texts)
        if all(text.bias is None and text.k.shape[1] == longest for text in texts):
            return cls(torch.cat([text.k for text in texts]), torch.cat([text.v for text in texts]), None)
        filled = []
        for k, v, bias in texts:
            missing = longest - k.shape[1]
            bias = k.new_zeros(k.shape[0], 1, 1, k.shape[1]) if bias is None else bias
            k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
            filled.append((k, v, F.pad(bias, (0, missing), value=float("-inf"))))
        return cls(*map(torch.cat, zip(*filled, strict=True)))


class KeyLayout(NamedTuple):
    """What keys of every layer have in common."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    static: bool = False
    """For compiled passes: slots are told as data, and buffers keep their addresses, which CUDA graphs may record."""

    @classmethod
    def of(cls, k: Tensor) -> KeyLayout:
        """The layout of keys [B F T N D]."""
        return cls(k.shape[0], *k.shape[2:], k.dtype, k.device)

    def zeros(self, frames: int) -> Tensor:
        """A buffer [B frames T N D]."""
        shape = self.batch, frames, self.tokens, self.num_heads, self.head_dim
        buffer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.static:
            torch._dynamo.mark_static_address(buffer)
        return buffer


@dataclass(frozen=True)
class Slots:
    """Buffers of one layer, [B slots T N D]."""

    k: Tensor
    v: Tensor
    sink: Tensor | None
    """The sink's keys at the positions where they were made, where the ring's copy of them is moved along."""


@dataclass(frozen=True)
class CachePass:
    """Where a pass over the frames of one chunk writes and reads in every layer; all of it known before the pass."""

    layers: list[Slots]
    start_frame: int
    frames: int
    visible: tuple[FrameRange, ...]
    """Slots that the chunk sees."""
    writes: tuple[tuple[int, int, int], ...]
    """(slot, first frame of the chunk, frames) of each run of slots that it fills."""
    index: Tensor | None
    """Slot of each of its frames, the same as ``writes``, as data: one compiled graph then serves every position."""
    sink: int
    sink_made: FrameRange
    """Frames of the sink that belong to the chunk."""
    sink_shift: Tensor | None
    """Rotation that moves the sink along (see :func:`model.rope.shift_table`); None leaves it."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        """Join keys and values [B F T N D] of the chunk, rotary applied, to their visible context: [B S N D].

        Without grad they are written to the buffers, and views of these come back wherever the visible slots are
        contiguous. Under grad nothing is written: new tensors come back, whose context part is detached.
        """
        slots = self.layers[layer]
        if torch.is_grad_enabled():
            return self._join(slots.k, k, moved=True), self._join(slots.v, v)
        self._write(slots.k, k)
        self._write(slots.v, v)
        if slots.sink is not None:
            self._place_sink(slots, k)
            return self._read(slots.k), self._read(slots.v)
        return self._read(slots.k, moved=True), self._read(slots.v)

    def _write(self, buffer: Tensor, live: Tensor) -> None:
        if self.index is not None:
            buffer.index_copy_(1, self.index, live)
            return
        for slot, first, frames in self.writes:
            buffer[:, slot : slot + frames] = live[:, first : first + frames]

    def _place_sink(self, slots: Slots, k: Tensor) -> None:
        low, high = self.sink_made
        if low < high:
            slots.sink[:, low:high] = k[:, : high - low]
        if self.sink_shift is not None:
            slots.k[:, : self.sink] = apply_rotary(slots.sink, self.sink_shift)

    def _read(self, buffer: Tensor, *, moved: bool = False) -> Tensor:
        parts = [self._part(buffer, low, high, moved) for low, high in self.visible]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)

    def _join(self, buffer: Tensor, live: Tensor, *, moved: bool = False) -> Tensor:
        context = [
            self._part(buffer, low, min(high, self.start_frame), moved).detach()
            for low, high in self.visible
            if low < self.start_frame
        ]
        return torch.cat([*context, live], dim=1).flatten(1, 2)

    def _part(self, buffer: Tensor, low: int, high: int, moved: bool) -> Tensor:
        part = buffer[:, low:high]
        return apply_rotary(part, self.sink_shift) if moved and self.sink_shift is not None and low == 0 else part


class KVCache:
    """Keys and values of the frames generated so far, one pair of buffers a layer, made on first use.

    A slot is a pure function of the absolute frame index, so a pass may be repeated, and every denoising pass of a
    chunk overwrites that chunk's own slots; nothing is counted or shifted. Two regimes:

    - Without grad, with a window: a ring of ``window`` frames. A new chunk overwrites the oldest frames behind the
      sink; the buffer itself is what attention reads (it does not care about key order once rotary is applied).
    - ``append_only`` (training): every frame keeps its own slot, so a checkpointed pass that is recomputed in backward
      finds the values it saw. Under grad nothing is written: the detached context and the live keys are concatenated.

    Args:
        num_layers: layers of the transformer.
        window: most frames attention sees, the current chunk included; None sees everything.
        sink: first frames that never leave the window.
        relative: positions count within the window (Infinity-RoPE, arXiv 2511.20649): the sink is followed by the
            oldest frame still held, so that distances never exceed ``window`` however long the stream. Attention only
            knows distances, so it is enough to move the sink's keys along with the window.
        append_only: keep every frame (needed for passes under grad).
    """

    def __init__(
        self,
        num_layers: int,
        *,
        window: int | None = None,
        sink: int = 0,
        relative: bool = False,
        append_only: bool = False,
    ) -> None:
        self.num_layers = num_layers
        self.append_only = append_only
        self.set_window(window, sink, relative)
        self.reset()

    def set_window(self, window: int | None, sink: int = 0, relative: bool = False) -> None:
        """Change how much attention sees and where; call :meth:`reset` before the next chunk."""
        if window is not None and not 0 <= sink < window:
            raise ValueError(f"sink={sink} must be at least 0 and smaller than window={window}")
        self.window = window
        self.sink = sink if window is not None else 0
        self.relative = relative

    def reset(self, num_frames: int | None = None) -> None:
        """Forget everything; ``num_frames``, where known, is how many frames will come (sizes the buffers)."""
        self._expected = num_frames
        self._layout: KeyLayout | None = None
        self._layers: list[Slots] = []
        self._prompt: Tensor | None = None
        self._text: list[CachedText] = []

    def restarted(self, *, keep_sink: bool = False) -> KVCache:
        """A new cache with these settings that holds nothing, or only the sink, its keys as they were first made.

        This one is left as it is, for passes that backward recomputes.
        """
        fresh = KVCache(
            self.num_layers, window=self.window, sink=self.sink, relative=self.relative, append_only=self.append_only
        )
        if keep_sink and self.sink and self._layers:
            fresh._allocate(self._layout, 0, self.sink)
            for new, old in zip(fresh._layers, self._layers, strict=True):
                first = old.k if old.sink is None else old.sink
                held = min(self.sink, first.shape[1])
                new.k[:, :held], new.v[:, :held] = first[:, :held], old.v[:, :held]
                if new.sink is not None:
                    new.sink[:, :held] = first[:, :held]
        return fresh

    @property
    def ring(self) -> bool:
        """Whether old frames are overwritten."""
        return self.window is not None and not self.append_only

    def open(self, layout: KeyLayout, start_frame: int, frames: int) -> CachePass:
        """Prepare a pass over the chunk of ``frames`` frames from absolute frame ``start_frame``.

        Raises:
            ValueError: a chunk larger than the window's rolling part, a ring cache under grad, or a batch or
                resolution that changed after frame 0.
        """
        end = start_frame + frames
        if self.window is not None and frames > self.window - self.sink:
            raise ValueError(
                f"a chunk of {frames} frames does not fit the window: window={self.window} less sink={self.sink}"
            )
        if torch.is_grad_enabled():
            if self.ring:
                raise ValueError("a rolling KVCache cannot be used under grad; make it with append_only=True")
            if start_frame > 0 and not self._layers:
                raise ValueError(f"no context before frame {start_frame}: was reset() called before backward was done?")
        self._allocate(layout, start_frame, end)
        moves = self.relative and self.sink > 0 and end > self.window
        return CachePass(
            self._layers,
            start_frame,
            frames,
            ((0, min(end, self.window)),) if self.ring else visible_frames(end, self.window, self.sink),
            tuple(self._runs(start_frame, end)),
            self._index(start_frame, end) if layout.static else None,
            self.sink,
            (min(start_frame, self.sink), min(end, self.sink)),
            shift_table(end - self.window, layout.head_dim, layout.device) if moves else None,
        )

    def extend(self, layer: int, k: Tensor, v: Tensor, start_frame: int) -> KeyValue:
        """One layer's :meth:`CachePass.extend` of keys and values [B F T N D] of frames ``start_frame ...``."""
        return self.open(KeyLayout.of(k), start_frame, k.shape[1]).extend(layer, k, v)

    def text(self, prompt_embeds: Tensor, compute: Callable[[], list[CachedText]]) -> list[CachedText]:
        """What cross-attention reads of a prompt, computed once until another tensor is given."""
        if self._prompt is not prompt_embeds:
            self._text = compute()
            self._prompt = prompt_embeds
        return self._text

    def _allocate(self, layout: KeyLayout, start_frame: int, end: int) -> None:
        """Make or enlarge the buffers of every layer."""
        if self._layers and self._layout != layout:
            if start_frame > 0:
                raise ValueError(
                    f"keys {layout} at frame {start_frame} do not continue the cached {self._layout}; "
                    "call reset() before changing batch or resolution"
                )
            self._layers = []
        self._layout = layout
        held = self._layers[0].k.shape[1] if self._layers else 0
        frames = max(end, self._expected or 0)
        needed = min(frames, self.window) if self.ring else frames
        if held >= needed:
            return
        size = max(needed, min(2 * held, self.window) if self.ring else 2 * held)
        fresh = []
        for layer in range(self.num_layers):
            sink = layout.zeros(self.sink) if self.ring and self.relative and self.sink else None
            slots = Slots(layout.zeros(size), layout.zeros(size), sink)
            if held:
                old = self._layers[layer]
                slots.k[:, :held], slots.v[:, :held] = old.k, old.v
                slots = Slots(slots.k, slots.v, old.sink)
            fresh.append(slots)
        self._layers = fresh

    def _index(self, start_frame: int, end: int) -> Tensor:
        """Slots of frames [start, end), computed on the device: nothing is copied to it."""
        frames = torch.arange(start_frame, end, device=self._layout.device)
        if not self.ring or end <= self.window:
            return frames
        rolled = self.sink + (frames - self.sink) % (self.window - self.sink)
        return torch.where(frames < self.window, frames, rolled)

    def _runs(self, start_frame: int, end: int) -> list[tuple[int, int, int]]:
        """Runs of consecutive slots for frames [start, end): (slot, first frame counted from the start, frames)."""
        if not self.ring:
            return [(start_frame, 0, end - start_frame)]
        runs, frame = [], start_frame
        while frame < end:
            slot = frame if frame < self.window else self.sink + (frame - self.sink) % (self.window - self.sink)
            size = min(end - frame, self.window - slot)
            runs.append((slot, frame - start_frame, size))
            frame += size
        return runs
