"""One ``attention`` over several kernels, and the frame-level masks of block-causal training.

Shapes: B batch, L query tokens, S key tokens, N heads, D head dim, F frames, T tokens a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from model.kernels import AttentionBackend, resolve_backend, run_kernel, sdpa

__all__ = ["AttentionBackend", "resolve_backend"]

FrameRange = tuple[int, int]


@dataclass(frozen=True)
class BlockMask:
    """A mask between frames, stored as ranges. It is exact, small and hashable.

    Attributes:
        rows: for each range [start, end) of query frames, the ranges of key frames that it sees. The rows are
            consecutive and cover the sequence.
        positions: the rotary frame index of each frame of the sequence.
    """

    rows: tuple[tuple[FrameRange, tuple[FrameRange, ...]], ...]
    positions: tuple[int, ...]

    def dense(self) -> Tensor:
        """Return a boolean [F F]: True if the query frame (row) sees the key frame (column)."""
        mask = torch.zeros(len(self.positions), len(self.positions), dtype=torch.bool)
        for (start, end), keys in self.rows:
            for key_start, key_end in keys:
                mask[start:end, key_start:key_end] = True
        return mask


def chunk_ranges(num_frames: int, frames_per_chunk: int, independent_first_frame: bool = False) -> list[FrameRange]:
    """Split frames into chunks [start, end). With ``independent_first_frame`` the first chunk has one frame.

    Raises:
        ValueError: the frames do not fill whole chunks.
    """
    first = 1 if independent_first_frame else 0
    if num_frames <= 0 or (num_frames - first) % frames_per_chunk:
        plus = "1 + " if independent_first_frame else ""
        raise ValueError(
            f"num_frames={num_frames} is not {plus}a multiple of frames_per_chunk={frames_per_chunk}; "
            f"use {max(first, num_frames - (num_frames - first) % frames_per_chunk) or frames_per_chunk} "
            f"or {num_frames + (first - num_frames) % frames_per_chunk}"
        )
    starts = [0] * first + list(range(first, num_frames, frames_per_chunk))
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


def visible_frames(end: int, window: int | None, sink: int = 0) -> tuple[FrameRange, ...]:
    """Return the frames that a chunk ending at ``end`` sees, its own included: the sink and the rest of the window."""
    if window is None or end <= window:
        return ((0, end),)
    recent = (end - (window - sink), end)
    return ((0, sink), recent) if sink else (recent,)


def block_causal_mask(
    num_frames: int,
    frames_per_chunk: int,
    *,
    window: int | None = None,
    sink: int = 0,
    independent_first_frame: bool = False,
) -> BlockMask:
    """Return a mask in which a chunk sees itself and earlier chunks, at most ``window`` frames in all."""
    chunks = chunk_ranges(num_frames, frames_per_chunk, independent_first_frame)
    rows = tuple(((start, end), visible_frames(end, window, sink)) for start, end in chunks)
    return BlockMask(rows, tuple(range(num_frames)))


def teacher_forcing_mask(
    num_frames: int,
    frames_per_chunk: int,
    *,
    window: int | None = None,
    sink: int = 0,
    independent_first_frame: bool = False,
) -> BlockMask:
    """Return a mask over ``[clean | noisy]`` (2 F frames): noisy chunks see earlier clean chunks and themselves."""
    clean = block_causal_mask(
        num_frames, frames_per_chunk, window=window, sink=sink, independent_first_frame=independent_first_frame
    )
    noisy = tuple(
        (
            (num_frames + start, num_frames + end),
            (*_before(start, keys), (num_frames + start, num_frames + end)),
        )
        for (start, end), keys in clean.rows
    )
    return BlockMask(clean.rows + noisy, clean.positions * 2)


def _before(start: int, ranges: Iterable[FrameRange]) -> tuple[FrameRange, ...]:
    return tuple((low, min(high, start)) for low, high in ranges if low < start)


@dataclass(frozen=True)
class FlexMask:
    """A :class:`BlockMask` in the form that flex_attention needs on a GPU. It is made once a pass, for all layers."""

    frames: BlockMask
    blocks: flex.BlockMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockMask | FlexMask | None = None,
    bias: Tensor | None = None,
    backend: AttentionBackend = AttentionBackend.auto,
) -> Tensor:
    """Scaled dot-product attention without dropout.

    Args:
        q: [B L N D].
        k, v: [B S N D].
        mask: which frames see each other, for L = S. T follows from L. None: everything is visible.
        bias: [B 1 1 S], added to the logits of every query. ``sdpa`` then computes the attention.
        backend: the kernel for attention without a mask. It must run here (see :func:`resolve_backend`).

    Returns:
        [B L N D].
    """
    if bias is not None:
        return sdpa(q, k, v, bias)
    if backend is AttentionBackend.auto:
        backend = resolve_backend(backend, q.device, q.dtype)
    if mask is None:
        return run_kernel(backend, q, k, v)
    if isinstance(mask, FlexMask):
        return _flex(q, k, v, mask)
    tokens = q.shape[1] // len(mask.positions)
    return torch.cat(
        [
            run_kernel(backend, q[:, start * tokens : end * tokens], _frames(k, keys, tokens), _frames(v, keys, tokens))
            for (start, end), keys in mask.rows
        ],
        dim=1,
    )


def _frames(x: Tensor, ranges: tuple[FrameRange, ...], tokens: int) -> Tensor:
    """Return the tokens of some frames of x [B S N D]."""
    parts = [x[:, start * tokens : end * tokens] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@lru_cache(maxsize=16)
def flex_mask(mask: BlockMask, tokens: int, device: torch.device, *, compiled: bool = True) -> FlexMask:
    """Prepare a mask for flex_attention. Call it outside compiled code, because its cache works only there.

    ``compiled``: compute the mask block by block. All queries times all keys at once take 4 GB at 65,520 tokens.
    """
    visible = mask.dense().to(device)
    length = tokens * len(mask.positions)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query // tokens, key // tokens]

    blocks = flex.create_block_mask(sees, None, None, length, length, device=device, _compile=compiled)
    return FlexMask(mask, blocks)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: FlexMask) -> Tensor:
    kernel = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return kernel(q, k, v, block_mask=mask.blocks).transpose(1, 2)
