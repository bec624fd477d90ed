"""One ``attention`` over several kernels, and the frame-level masks of block-causal training.

Shapes: B batch, L query tokens, S key tokens, N heads, D head dim, F frames, T tokens a frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FrameRange = tuple[int, int]


class AttentionBackend(Enum):
    """Which kernel computes attention."""

    auto = "auto"
    """The fastest of those below that can run and compute in full: flash3, cudnn (Hopper on), flash, sdpa."""
    flash = "flash"
    """flash-attn, Ampere and later."""
    flash3 = "flash3"
    """FlashAttention-3 (package flash_attn_interface), Hopper."""
    cudnn = "cudnn"
    """SDPA by cuDNN, Hopper and later."""
    sage = "sage"
    """SageAttention: 8-bit products, faster and less exact; never chosen by itself."""
    sdpa = "sdpa"
    """torch's own choice; any device."""


class _Need(NamedTuple):
    """What a backend cannot do without."""

    capability: tuple[int, int]
    package: str | None


_NEEDS = {
    AttentionBackend.flash3: _Need((9, 0), "flash_attn_interface"),
    AttentionBackend.cudnn: _Need((9, 0), None),
    AttentionBackend.flash: _Need((8, 0), "flash_attn"),
    AttentionBackend.sage: _Need((8, 0), "sageattention"),
}
_ORDER = (AttentionBackend.flash3, AttentionBackend.cudnn, AttentionBackend.flash)


@dataclass(frozen=True)
class BlockMask:
    """Which frames see which, as ranges: exact, tiny, and hashable.

    Attributes:
        rows: for consecutive query frames [start, end), the key frame ranges they see; rows tile the sequence.
        positions: rotary frame index of each frame of the sequence.
    """

    rows: tuple[tuple[FrameRange, tuple[FrameRange, ...]], ...]
    positions: tuple[int, ...]

    def dense(self) -> Tensor:
        """Boolean [F F]: query frame (row) sees key frame (column)."""
        mask = torch.zeros(len(self.positions), len(self.positions), dtype=torch.bool)
        for (start, end), keys in self.rows:
            for key_start, key_end in keys:
                mask[start:end, key_start:key_end] = True
        return mask


def chunk_ranges(num_frames: int, frames_per_chunk: int, independent_first_frame: bool = False) -> list[FrameRange]:
    """Split frames into chunks [start, end); with ``independent_first_frame`` the first chunk is one frame.

    Raises:
        ValueError: the frames do not divide into whole chunks.
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
    """Frame ranges a chunk that ends at ``end`` sees, itself included: the sink, then the last of the window."""
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
    """Every chunk sees itself and the chunks before it, within ``window`` frames (itself included)."""
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
    """Mask over ``[clean | noisy]`` (2 F frames): noisy chunks see earlier clean chunks and themselves."""
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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockMask | None = None,
    bias: Tensor | None = None,
    backend: AttentionBackend = AttentionBackend.auto,
) -> Tensor:
    """Scaled dot-product attention without dropout.

    Args:
        q: [B L N D].
        k, v: [B S N D].
        mask: frame-level mask over a square problem; tokens a frame are derived from L. None sees everything.
        bias: [B 1 1 S], added to the logits of every query; always computed by SDPA.
        backend: kernel to use for the unmasked products, one that can run here (see :func:`resolve_backend`).

    Returns:
        [B L N D].
    """
    if bias is not None:
        return _sdpa(q, k, v, bias)
    if mask is None:
        return _dense(q, k, v, backend)
    tokens = q.shape[1] // len(mask.positions)
    if q.is_cuda:
        return _flex(q, k, v, mask, tokens)
    return torch.cat(
        [
            _dense(q[:, start * tokens : end * tokens], _gather(k, keys, tokens), _gather(v, keys, tokens), backend)
            for (start, end), keys in mask.rows
        ],
        dim=1,
    )


@lru_cache
def resolve_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The kernel ``attention`` will use for tensors of this device and dtype.

    Raises:
        ValueError: a kernel is asked for that cannot run here.
    """
    if backend is AttentionBackend.auto:
        return next((one for one in _ORDER if _missing(one, device, dtype) is None), AttentionBackend.sdpa)
    missing = _missing(backend, device, dtype)
    if missing:
        raise ValueError(f"attention backend {backend.value!r} needs {missing}; use 'auto' or 'sdpa'")
    return backend


def _missing(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a backend needs and does not find, in words; None if it can run."""
    if backend is AttentionBackend.sdpa:
        return None
    need = _NEEDS[backend]
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"a CUDA device and half precision, not {device} and {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < need.capability:
        return f"an NVIDIA GPU of capability {need.capability} or more, not {capability}"
    if need.package is not None and find_spec(need.package) is None:
        return f"the package {need.package}, which is not installed"
    return None


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    match resolve_backend(backend, q.device, q.dtype) if backend is AttentionBackend.auto else backend:
        case AttentionBackend.flash:
            from flash_attn import flash_attn_func

            return flash_attn_func(q, k, v)
        case AttentionBackend.flash3:
            from flash_attn_interface import flash_attn_func

            out = flash_attn_func(q, k, v)
            return out[0] if isinstance(out, tuple) else out  # earlier releases return the logsumexp too
        case AttentionBackend.sage:
            from sageattention import sageattn

            return sageattn(q, k, v, tensor_layout="NHD")
        case AttentionBackend.cudnn:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return _sdpa(q, k, v)
    return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _gather(x: Tensor, ranges: tuple[FrameRange, ...], tokens: int) -> Tensor:
    parts = [x[:, start * tokens : end * tokens] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@lru_cache(maxsize=16)
def _flex_kernel(mask: BlockMask, tokens: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = mask.dense().to(device)
    length = tokens * len(mask.positions)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query // tokens, key // tokens]

    blocks = create_block_mask(sees, None, None, length, length, device=device)
    return torch.compile(flex_attention), blocks


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, tokens: int) -> Tensor:
    kernel, blocks = _flex_kernel(mask, tokens, q.device)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return kernel(q, k, v, block_mask=blocks).transpose(1, 2)
