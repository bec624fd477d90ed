"""Triton kernels for what torch.compile leaves in several kernels. :mod:`model.fused_ops` makes operators of them.

Import this module only where triton is installed. On a CPU the kernels run in triton's interpreter if the variable
TRITON_INTERPRET is 1 before triton is imported. All of them compute in float32 and round once, when they store.

Shapes: B batch, F frames, T tokens a frame, C model dim or channels, N heads, D head dim, H W size of a frame, K frames
that a causal convolution keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers that one program of the codec's kernels holds at once."""


@triton.jit
def _norm_kernel(
    x, branch, gate, shift, scale, total, out, frames, tokens, channels, gate_batch, gate_frame, shift_batch,
    shift_frame, scale_batch, scale_frame, eps, offset, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: ``total = x + gate * branch``, then ``layer_norm(total) * (offset + scale) + shift``."""
    row = tl.program_id(0).to(tl.int64)
    batch, frame = row // (frames * tokens), (row // tokens) % frames
    column = tl.arange(0, BLOCK)
    inside = column < channels
    value = tl.load(x + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row * channels + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            gates = tl.load(gate + batch * gate_batch + frame * gate_frame + column, mask=inside, other=0.0)
            added = added * gates.to(tl.float32)
        value = (value + added).to(total.dtype.element_ty)
        tl.store(total + row * channels + column, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, axis=0) / channels
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / channels
    shifts = tl.load(shift + batch * shift_batch + frame * shift_frame + column, mask=inside, other=0.0).to(tl.float32)
    scales = tl.load(scale + batch * scale_batch + frame * scale_frame + column, mask=inside, other=0.0).to(tl.float32)
    normed = centred * tl.rsqrt(variance + eps) * (offset + scales) + shifts
    tl.store(out + row * channels + column, normed.to(out.dtype.element_ty), mask=inside)


def norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    total: Tensor | None,
    out: Tensor,
    *,
    eps: float,
    offset: float,
) -> None:
    """Fill ``total`` (if there is a branch) and ``out``; see :func:`model.fused_ops.residual_norm`.

    Args:
        x, branch, total, out: [B F T C], contiguous.
        gate, shift, scale: [B F C], contiguous in C; other strides may be 0.
    """
    batch, frames, tokens, channels = x.shape
    unused = x
    gates = shift if gate is None else gate
    block = triton.next_power_of_2(channels)
    _norm_kernel[(batch * frames * tokens,)](
        x, unused if branch is None else branch, gates, shift, scale, unused if total is None else total, out,
        frames, tokens, channels, *gates.stride()[:2], *shift.stride()[:2], *scale.stride()[:2], eps, offset,
        HAS_BRANCH=branch is not None, HAS_GATE=gate is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


@triton.jit
def _split_kernel(
    qkv, weight, table, index, q, keys, values, frames, tokens, channels, qkv_batch, qkv_frame, qkv_token,
    table_batch, table_frame, table_token, slots, eps, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's q, k or v: RMS norm over the full width and rotation of q and k, and a write into their place."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, frame, token = row // (frames * tokens), (row // tokens) % frames, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < channels
    source = qkv + batch * qkv_batch + frame * qkv_frame + token * qkv_token + part * channels
    raw = tl.load(source + column, mask=inside, other=0.0)
    slot = tl.load(index + frame)
    place = ((batch * slots + slot) * tokens + token) * channels + column
    if part == 2:
        tl.store(values + place, raw, mask=inside)
    else:
        value = raw.to(tl.float32)
        weights = tl.load(weight + part * channels + column, mask=inside, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / channels + eps) * weights
        rotation = table + batch * table_batch + frame * table_frame + token * table_token
        turn = tl.load(rotation + column % HEAD, mask=inside, other=0.0)
        real, imaginary = tl.split(tl.reshape(value, (BLOCK // 2, 2)))
        cosine, sine = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        result = tl.reshape(turned, (BLOCK,)).to(q.dtype.element_ty)
        if part == 0:
            tl.store(q + row * channels + column, result, mask=inside)
        else:
            tl.store(keys + place, result, mask=inside)


def split_qkv(
    qkv: Tensor, weight: Tensor, table: Tensor, index: Tensor, q: Tensor, keys: Tensor, values: Tensor, *, eps: float
) -> None:
    """Fill q and the slots ``index`` of keys and values; see :func:`model.fused_ops.split_qkv`.

    Args:
        qkv: [B F T 3C], contiguous in C.
        weight: [2 C], contiguous.
        table: [B F T D] float32, contiguous in D.
        q: [B F T N D], contiguous.
        keys, values: [B slots T N D], contiguous.
    """
    batch, frames, tokens = qkv.shape[:3]
    channels = weight.shape[1]
    block = triton.next_power_of_2(channels)
    _split_kernel[(batch * frames * tokens, 3)](
        qkv, weight, table, index, q, keys, values, frames, tokens, channels, *qkv.stride()[:3],
        *table.stride()[:3], keys.shape[1], eps, HEAD=q.shape[-1], BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


@triton.jit(do_not_specialize=["frames", "pixels"])
def _norm_silu_kernel(
    x, bias, gamma, memory, buffer, frames, pixels, channels, floor, root, KEPT: tl.constexpr, HAS_BIAS:
    tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A few pixels through all frames: fill the buffer with the memory and ``silu(norm(x + bias))``; renew the memory.

    One program owns its pixels, so it can read the memory, and write it later, without another program between.
    """
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (column < channels)[None, :]
    offset = pixel[:, None] * channels + column[None, :]
    step = pixels.to(tl.int64) * channels
    for frame in tl.static_range(KEPT):
        kept = tl.load(memory + frame * step + offset, mask=inside)
        tl.debug_barrier()  # another thread of this program may write what this one reads
        tl.store(buffer + frame * step + offset, kept, mask=inside)
        if frame >= frames:  # fewer frames came than are kept: the memory moves up
            tl.store(memory + (frame - frames) * step + offset, kept, mask=inside)
    gammas = tl.load(gamma + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        biases = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    for frame in range(frames):
        value = tl.load(x + frame * step + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += biases
        length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), floor)
        normed = value * (root / length)[:, None] * gammas
        active = (normed / (1.0 + tl.exp(-normed))).to(buffer.dtype.element_ty)
        tl.store(buffer + (KEPT + frame) * step + offset, active, mask=inside)
        if frame + KEPT >= frames:
            tl.store(memory + (frame + KEPT - frames) * step + offset, active, mask=inside)


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, memory: Tensor, buffer: Tensor, *, floor: float) -> None:
    """Fill ``buffer`` and renew ``memory``; see :func:`model.fused_ops.norm_silu`. All tensors are contiguous."""
    frames, height, width, channels = x.shape
    block = triton.next_power_of_2(channels)
    at_once = max(1, TILE // block)
    _norm_silu_kernel[(triton.cdiv(height * width, at_once),)](
        x, gamma if bias is None else bias, gamma, memory, buffer, frames, height * width, channels, floor,
        channels**0.5, KEPT=len(memory), HAS_BIAS=bias is not None, PIXELS=at_once, BLOCK=block, num_warps=8,
    )  # fmt: skip


@triton.jit
def _add_kernel(x, bias, shortcut, out, numbers, channels, BLOCK: tl.constexpr):
    """``x + bias + shortcut``, of a run of numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + place % channels, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(shortcut + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def add_shortcut(x: Tensor, bias: Tensor, shortcut: Tensor, out: Tensor) -> None:
    """Fill ``out``; see :func:`model.fused_ops.add_shortcut`. All tensors are contiguous."""
    block, numbers = TILE // 4, x.numel()
    grid = (triton.cdiv(numbers, block),)
    _add_kernel[grid](x, bias, shortcut, out, numbers, x.shape[-1], BLOCK=block, num_warps=4)


def _warps(block: int) -> int:
    """Warps of a program that holds ``block`` numbers of one token: eight numbers a thread, at most 16 warps."""
    return min(16, max(1, block // 256))


def on_device(x: Tensor) -> torch.cuda.device_of:
    """Launch kernels on the GPU that holds x; on a CPU it does nothing."""
    return torch.cuda.device_of(x)
