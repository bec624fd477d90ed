"""The KV cache of causal generation: finished frames, a rolling window, an attention sink, and the prompt.

Shapes: B batch, F frames of a chunk, T tokens a frame, N heads, D head dim, S visible keys, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import visible_frames
from model.layer_cache import ChunkSlots, KeyLayout, LayerBuffers, LayerCache
from model.rope import shift_table


class CachedText(NamedTuple):
    """The keys and values of a prompt in one layer."""

    k: Tensor
    """[B L N D]."""
    v: Tensor
    """[B L N D]."""
    bias: Tensor | None
    """[B 1 1 L], added to the logits; None adds nothing."""

    @classmethod
    def batch(cls, texts: Sequence[CachedText]) -> CachedText:
        """Join several prompts into one batch. Shorter ones are padded with keys that no query sees."""
        longest = max(text.k.shape[1] for text in texts)
        if all(text.bias is None and text.k.shape[1] == longest for text in texts):
            return cls(torch.cat([text.k for text in texts]), torch.cat([text.v for text in texts]), None)
        padded = []
        for k, v, bias in texts:
            lacking = longest - k.shape[1]
            bias = k.new_zeros(k.shape[0], 1, 1, k.shape[1]) if bias is None else bias
            k, v = (F.pad(x, (0, 0, 0, 0, 0, lacking)) for x in (k, v))
            padded.append((k, v, F.pad(bias, (0, lacking), value=float("-inf"))))
        return cls(*map(torch.cat, zip(*padded, strict=True)))


class KVCache:
    """Keys and values of the frames generated so far: a :class:`LayerCache` for each layer, made on first use.

    The slot of a frame depends only on its absolute index. A pass may therefore be repeated: every denoising pass of
    a chunk overwrites the slots of that chunk. There are two ways to keep frames:

    - A ring of ``window`` frames, for inference. A new chunk overwrites the oldest frames after the sink, and
      attention reads the buffer directly. Rotated keys may be in any order.
    - ``append_only``, for training. Every frame has its own slot, so a checkpointed pass finds the same values when
      backward recomputes it. A pass under grad writes nothing, unless it only fills the cache. Then the cache keeps
      the autograd graph of its keys and values, and the gradient of later chunks reaches them.

    Usage, once for each pass: ``chunk = cache.open(layout, start_frame, frames)``, then in each layer
    ``k, v = cache.layers[i].extend(k, v, chunk)``.

    Args:
        num_layers: layers of the transformer.
        window: the most frames that attention sees, the current chunk included; None sees all.
        sink: the number of first frames that never leave the window.
        relative: count positions within the window (Infinity-RoPE, arXiv 2511.20649), so that no distance exceeds
            ``window`` in a stream of any length. Attention depends only on distances, so only the keys of the
            sink move with the window.
        append_only: keep every frame.
        fp8: store keys and values in 8-bit floats with a scale for every head and token: half the memory of bfloat16.
        buffers: buffers to use if they fit, and to keep over :meth:`reset` and :meth:`restarted`. Nothing is allocated
            a second time then, and CUDA graphs find every key at its address. For inference: nothing may need an
            earlier state. None: every reset makes new ones.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        window: int | None = None,
        sink: int = 0,
        relative: bool = False,
        append_only: bool = False,
        fp8: bool = False,
        buffers: LayerBuffers | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.append_only = append_only
        self._buffers = buffers
        self.configure(window=window, sink=sink, relative=relative, fp8=fp8)
        self.reset()

    def configure(self, *, window: int | None = None, sink: int = 0, relative: bool = False, fp8: bool = False) -> None:
        """Change what attention sees and how keys are stored. Call :meth:`reset` before the next chunk."""
        if window is not None and not 0 <= sink < window:
            raise ValueError(f"sink={sink} must be at least 0 and smaller than window={window}")
        self.window = window
        self.sink = sink if window is not None else 0
        self.relative = relative
        self.fp8 = fp8

    def reset(self, num_frames: int | None = None) -> None:
        """Forget everything. ``num_frames`` is the length of the clip, if known. It sets the size of the buffers."""
        self._expected = num_frames
        self._layout: KeyLayout | None = None
        self.layers: list[LayerCache] = []
        self._prompt: Tensor | None = None
        self._text: list[CachedText] = []

    def restarted(self, *, keep_sink: bool = False) -> KVCache:
        """Make a new cache with the same settings. It is empty, or holds only the sink with its original keys.

        This cache does not change, because backward may still recompute passes that read it. But if it keeps its
        buffers, it is the new cache itself.
        """
        if self._buffers is not None:
            self._restart(keep_sink)
            return self
        fresh = KVCache(
            self.num_layers,
            window=self.window,
            sink=self.sink,
            relative=self.relative,
            append_only=self.append_only,
            fp8=self.fp8,
        )
        if keep_sink and self.sink and self.layers:
            fresh._allocate(self._layout, 0, self.sink)
            held = min(self.sink, self.layers[0].slots)
            for new, old in zip(fresh.layers, self.layers, strict=True):
                new.k.copy_from(old.k, held)
                new.v.copy_from(old.v, held)
                if new.sink is not None:
                    new.sink[:, :held] = old.sink[:, :held]
                    new.k.write_at(0, old.sink[:, :held])
        return fresh

    def _restart(self, keep_sink: bool) -> None:
        """Forget everything but, with ``keep_sink``, the sink with its original keys."""
        if not (keep_sink and self.sink and self.layers):
            self.reset()
            return
        self._expected = None
        for layer in self.layers:
            if layer.sink is not None:
                layer.k.write_at(0, layer.sink[:, : layer.slots])

    @property
    def ring(self) -> bool:
        """True if new frames overwrite old ones."""
        return self.window is not None and not self.append_only

    def open(self, layout: KeyLayout, start_frame: int, frames: int, *, keep_graph: bool = False) -> ChunkSlots:
        """Prepare a pass over a chunk of ``frames`` frames from absolute frame ``start_frame``.

        Args:
            keep_graph: under grad, write the chunk and keep the autograd graph of its keys and values.

        Raises:
            ValueError: the chunk is larger than the rolling part of the window, a ring is used under grad, the batch or
                resolution changed after frame 0, or the cache cannot keep a graph.
        """
        self._check(start_frame, frames)
        if keep_graph and (self.fp8 or (self.relative and self.sink)):
            raise ValueError(
                f"a KVCache with fp8={self.fp8}, relative={self.relative} and sink={self.sink} cannot keep the graph "
                "of its keys; use fp8=False, and no sink with relative=True"
            )
        end = start_frame + frames
        self._allocate(layout, start_frame, end)
        if self.layers[0].k.live and (keep_graph or not torch.is_grad_enabled()):
            for layer in self.layers:
                layer.forget_graph(start_frame, end)
        moves = self.relative and self.sink > 0 and end > self.window
        return ChunkSlots(
            start_frame,
            frames,
            visible=((0, min(end, self.window)),) if self.ring else visible_frames(end, self.window, self.sink),
            writes=tuple(self._runs(start_frame, end)),
            index=self._index(start_frame, end) if layout.static else None,
            sink=self.sink,
            sink_made=(min(start_frame, self.sink), min(end, self.sink)),
            sink_shift=shift_table(end - self.window, layout.head_dim, layout.device) if moves else None,
            keep_graph=keep_graph,
        )

    def extend(self, layer: int, k: Tensor, v: Tensor, start_frame: int) -> tuple[Tensor, Tensor]:
        """Call :meth:`LayerCache.extend` in one layer. Keys and values are [B F T N D], from frame ``start_frame``."""
        chunk = self.open(KeyLayout.of(k), start_frame, k.shape[1])
        return self.layers[layer].extend(k, v, chunk)

    def drop_graph(self) -> None:
        """Drop the autograd graph of keys and values, but not their values. Call it after the last pass of a rollout.

        The graph of a recomputed pass refers to this cache. If the cache also referred to the graph, neither would be
        freed unless backward runs.
        """
        for layer in self.layers:
            layer.k.drop_graph()
            layer.v.drop_graph()

    def text(self, prompt_embeds: Tensor, compute: Callable[[], list[CachedText]]) -> list[CachedText]:
        """Return the keys and values of a prompt in every layer. They are computed once for each new tensor."""
        if self._prompt is not prompt_embeds:
            self._text = compute()
            self._prompt = prompt_embeds
        return self._text

    def _check(self, start_frame: int, frames: int) -> None:
        if self.window is not None and frames > self.window - self.sink:
            raise ValueError(
                f"a chunk of {frames} frames does not fit the window: window={self.window} minus sink={self.sink}"
            )
        if torch.is_grad_enabled():
            if self.ring:
                raise ValueError("a rolling KVCache cannot be used under grad; make it with append_only=True")
            if start_frame > 0 and not self.layers:
                raise ValueError(f"no context before frame {start_frame}: was reset() called before backward was done?")

    def _allocate(self, layout: KeyLayout, start_frame: int, end: int) -> None:
        """Make or enlarge the buffers of every layer so that they hold frames up to ``end``."""
        if self.layers and self._layout != layout:
            if start_frame > 0:
                raise ValueError(
                    f"keys {layout} at frame {start_frame} do not continue the cached {self._layout}; "
                    "call reset() before changing batch or resolution"
                )
            self.layers = []
        self._layout = layout
        held = self.layers[0].slots if self.layers else 0
        frames = max(end, self._expected or 0)
        needed = min(frames, self.window) if self.ring else frames
        if held >= needed:
            return
        size = max(needed, min(2 * held, self.window) if self.ring else 2 * held)
        moved = self.sink if self.ring and self.relative else 0
        kept = self._buffers
        if kept is not None and not held:
            if kept.fit(self.num_layers, layout, needed, fp8=self.fp8, sink=moved):
                self.layers = kept.layers
                return
            kept.free()  # before new ones are made
        old_layers, self.layers = self.layers, []
        for layer in range(self.num_layers):
            fresh = LayerCache.empty(layout, size, sink=moved, fp8=self.fp8)
            if held:
                old = old_layers[layer]
                fresh.k.copy_from(old.k, held)
                fresh.v.copy_from(old.v, held)
                fresh = LayerCache(fresh.k, fresh.v, old.sink)
            self.layers.append(fresh)
        if kept is not None:
            kept.keep(self.layers, layout, fp8=self.fp8, sink=moved)

    def _slot(self, frame: int) -> int:
        if not self.ring or frame < self.window:
            return frame
        return self.sink + (frame - self.sink) % (self.window - self.sink)

    def _index(self, start_frame: int, end: int) -> Tensor:
        """Return the slots of frames [start, end). They are computed on the device, so nothing is copied to it."""
        frames = torch.arange(start_frame, end, device=self._layout.device)
        if not self.ring or end <= self.window:
            return frames
        rolled = self.sink + (frames - self.sink) % (self.window - self.sink)
        return torch.where(frames < self.window, frames, rolled)

    def _runs(self, start_frame: int, end: int) -> list[tuple[int, int, int]]:
        """Return runs of consecutive slots for frames [start, end): (slot, first frame relative to start, frames)."""
        if not self.ring:
            return [(start_frame, 0, end - start_frame)]
        runs, frame = [], start_frame
        while frame < end:
            slot = self._slot(frame)
            size = min(end - frame, self.window - slot)
            runs.append((slot, frame - start_frame, size))
            frame += size
        return runs
