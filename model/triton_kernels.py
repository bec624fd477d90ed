"""Triton kernels for what torch computes in several passes over memory: norms with what follows them.

They serve inference on a GPU without torch.compile, which fuses these operations itself. Each equals the plain
computation beside its call, which stays the definition. ``TRITON_INTERPRET=1`` runs them on a CPU, for tests.

Shapes: R rows, C channels, N heads, D head dim, P = D / 2 pairs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 2048
"""Channels of a row from which on one program computes one row."""


@triton.jit
def _rms_silu_kernel(x, gamma, out, rows, floor, channels: tl.constexpr, block: tl.constexpr, group: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    column = tl.arange(0, block)
    inside = (row[:, None] < rows) & (column[None, :] < channels)
    place = row[:, None] * channels + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, 1)), floor) * (1.0 / channels) ** 0.5
    weight = tl.load(gamma + column, mask=column < channels, other=0.0).to(tl.float32)
    value = value / length[:, None] * weight[None, :]
    tl.store(out + place, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


def rms_silu(x: Tensor, gamma: Tensor, out: Tensor, *, floor: float) -> Tensor:
    """``silu(x / rms(x) * gamma)`` over the last dimension, written to ``out``.

    Args:
        x: [... C], contiguous.
        gamma: [C].
        out: as ``x``, contiguous: for example the part of a convolution's buffer behind the kept frames.
        floor: the least length of a row.
    """
    channels = x.shape[-1]
    rows, block = x.numel() // channels, triton.next_power_of_2(channels)
    group = max(1, WIDE // block)
    with _device_of(x):
        _rms_silu_kernel[(triton.cdiv(rows, group),)](x, gamma, out, rows, floor, channels, block, group)
    return out


@triton.jit
def _modulate_kernel(x, shift, scale, out, rows_a_signal, eps, channels: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < channels
    value = tl.load(x + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / channels
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / channels
    signal = row // rows_a_signal * channels + column
    factor = 1.0 + tl.load(scale + signal, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + signal, mask=inside, other=0.0).to(tl.float32)
    value = centred * tl.rsqrt(variance + eps) * factor + offset
    tl.store(out + row * channels + column, value.to(out.dtype.element_ty), mask=inside)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """``layer_norm(x) (1 + scale) + shift``: x [B F T C], shift and scale [B f 1 C] with f = F or 1."""
    x = x.contiguous()
    channels, signals = x.shape[-1], shift.shape[0] * shift.shape[1]
    rows, out = x.numel() // channels, torch.empty_like(x)
    shift, scale = (signal.reshape(signals, channels).contiguous() for signal in (shift, scale))
    with _device_of(x):
        _modulate_kernel[(rows,)](
            x, shift, scale, out, rows // signals, eps, channels, triton.next_power_of_2(channels)
        )
    return out


@triton.jit
def _norm_rotary_kernel(
    qkv, weight, table, out, table_rows, eps, channels: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr
):
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, block)
    inside = 2 * pair < channels
    source = qkv + (3 * row + which) * channels + 2 * pair
    real = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    imaginary = tl.load(source + 1, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt((tl.sum(real * real, 0) + tl.sum(imaginary * imaginary, 0)) / channels + eps)
    real *= factor * tl.load(weight + which * channels + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    imaginary *= factor * tl.load(weight + which * channels + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    angle = table + 2 * (row % table_rows * pairs + pair % pairs)
    cos, sin = tl.load(angle, mask=inside, other=0.0), tl.load(angle + 1, mask=inside, other=0.0)
    target = out + (2 * row + which) * channels + 2 * pair
    tl.store(target, (real * cos - imaginary * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(target + 1, (real * sin + imaginary * cos).to(out.dtype.element_ty), mask=inside)


def norm_rotary(qkv: Tensor, weight: Tensor, table: Tensor, *, num_heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """q and k [B F T N D], normed over the model dim and rotated.

    Args:
        qkv: the joint product [B F T 3 C], contiguous.
        weight: of the norms of q and k, [2 C].
        table: [F T 1 P 2] float32 for all samples, or [B F T 1 P 2].
    """
    channels = qkv.shape[-1]
    rows, pairs = qkv.numel() // (3 * channels), channels // num_heads // 2
    out = qkv.new_empty(*qkv.shape[:-2], 2, channels)
    table = table.contiguous()
    with _device_of(qkv):
        _norm_rotary_kernel[(rows, 2)](
            qkv,
            weight.contiguous(),
            table,
            out,
            table.numel() // (2 * pairs),
            eps,
            channels,
            pairs,
            triton.next_power_of_2(channels // 2),
        )
    q, k = out.unflatten(-1, (num_heads, -1)).unbind(-3)
    return q, k


def _device_of(x: Tensor):
    """Launch on the device of x: the current device belongs to a thread and may be another."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
