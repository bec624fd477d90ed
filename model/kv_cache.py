"""The KV cache of causal generation: committed context, rolling window, attention sink, text keys and values.

Shapes: B batch, F frames of a chunk, T tokens a frame, N heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention import visible_frames

KeyValue = tuple[Tensor, Tensor]


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
        append_only: keep every frame (needed for passes under grad).
    """

    def __init__(self, num_layers: int, *, window: int | None = None, sink: int = 0, append_only: bool = False) -> None:
        self.num_layers = num_layers
        self.append_only = append_only
        self.set_window(window, sink)
        self.reset()

    def set_window(self, window: int | None, sink: int = 0) -> None:
        """Change how much attention sees; call :meth:`reset` before the next chunk."""
        if window is not None and not 0 <= sink < window:
            raise ValueError(f"sink={sink} must be at least 0 and smaller than window={window}")
        self.window = window
        self.sink = sink if window is not None else 0

    def reset(self, num_frames: int | None = None) -> None:
        """Forget everything; ``num_frames``, where known, is how many frames will come (sizes the buffers)."""
        self._expected = num_frames
        self._buffers: list[KeyValue | None] = [None] * self.num_layers
        self._prompt: Tensor | None = None
        self._text: list[KeyValue] = []

    @property
    def ring(self) -> bool:
        """Whether old frames are overwritten."""
        return self.window is not None and not self.append_only

    def extend(self, layer: int, k: Tensor, v: Tensor, start_frame: int) -> KeyValue:
        """Join the keys and values of frames ``start_frame ...`` to their visible context.

        Args:
            layer: index of the layer.
            k, v: [B F T N D], rotary applied.
            start_frame: absolute index of the first frame.

        Returns:
            keys and values the chunk attends to, [B S N D]. Without grad they live in the buffers, views wherever
            the visible frames are contiguous there. Under grad they are new tensors whose context part is detached.

        Raises:
            ValueError: a chunk larger than the window's rolling part, a ring cache under grad, or a batch or
                resolution that changed after frame 0.
        """
        frames, end = k.shape[1], start_frame + k.shape[1]
        if self.window is not None and frames > self.window - self.sink:
            raise ValueError(
                f"a chunk of {frames} frames does not fit the window: window={self.window} less sink={self.sink}"
            )
        if torch.is_grad_enabled():
            if self.ring:
                raise ValueError("a rolling KVCache cannot be used under grad; make it with append_only=True")
            if start_frame > 0 and self._buffers[layer] is None:
                raise ValueError(f"no context before frame {start_frame}: was reset() called before backward was done?")
            buffers = self._allocate(layer, k, start_frame, end)
            return tuple(
                self._join(buffer, live, start_frame, end) for buffer, live in zip(buffers, (k, v), strict=True)
            )
        buffers = self._allocate(layer, k, start_frame, end)
        return tuple(self._write(buffer, live, start_frame, end) for buffer, live in zip(buffers, (k, v), strict=True))

    def text(self, prompt_embeds: Tensor, compute: Callable[[], list[KeyValue]]) -> list[KeyValue]:
        """Cross-attention keys and values of a prompt, computed once until another tensor is given."""
        if self._prompt is not prompt_embeds:
            self._text = compute()
            self._prompt = prompt_embeds
        return self._text

    def _allocate(self, layer: int, k: Tensor, start_frame: int, end: int) -> KeyValue:
        buffers = self._buffers[layer]
        if buffers is not None and (_layout(buffers[0]) != _layout(k)):
            if start_frame > 0:
                raise ValueError(
                    f"keys {tuple(k.shape)} {k.dtype} at frame {start_frame} do not continue the cached "
                    f"{tuple(buffers[0].shape)} {buffers[0].dtype}; call reset() before changing batch or resolution"
                )
            buffers = None
        held = 0 if buffers is None else buffers[0].shape[1]
        needed = self._capacity(end)
        if held < needed:
            fresh = tuple(
                k.new_zeros(k.shape[0], max(needed, min(2 * held, self._limit())), *k.shape[2:]) for _ in "kv"
            )
            if buffers is not None:
                for new, old in zip(fresh, buffers, strict=True):
                    new[:, :held] = old
            self._buffers[layer] = buffers = fresh
        return buffers

    def _limit(self) -> int | float:
        return self.window if self.ring else float("inf")

    def _capacity(self, end: int) -> int:
        frames = max(end, self._expected or 0)
        return min(frames, self.window) if self.ring else frames

    def _visible(self, end: int) -> tuple[tuple[int, int], ...]:
        return visible_frames(end, self.window, self.sink)

    def _join(self, buffer: Tensor, live: Tensor, start_frame: int, end: int) -> Tensor:
        context = [buffer[:, low : min(high, start_frame)] for low, high in self._visible(end) if low < start_frame]
        return torch.cat([*(part.detach() for part in context), live], dim=1).flatten(1, 2)

    def _write(self, buffer: Tensor, live: Tensor, start_frame: int, end: int) -> Tensor:
        if not self.ring:
            buffer[:, start_frame:end] = live
            parts = [buffer[:, low:high] for low, high in self._visible(end)]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)
        done = 0
        while done < live.shape[1]:
            slot = self._slot(start_frame + done)
            size = min(live.shape[1] - done, self.window - slot)
            buffer[:, slot : slot + size] = live[:, done : done + size]
            done += size
        return buffer[:, : min(end, self.window)].flatten(1, 2)

    def _slot(self, frame: int) -> int:
        if frame < self.window:
            return frame
        return self.sink + (frame - self.sink) % (self.window - self.sink)


def _layout(x: Tensor) -> tuple:
    return x.shape[0], x.shape[2:], x.dtype, x.device
