"""Operators with one kernel each, for work that the compiler splits into several. For inference, without backward.

Each is registered with torch.library, so that a graph without breaks can hold it, and calls a kernel of
:mod:`model.fused_kernels`, which is imported on first use. They are used only if `optimize.kernels=triton` asks for
them: no GPU has measured them yet.

Shapes: B batch, F frames, T tokens a frame, C model dim or channels, N heads, D head dim, H W size of a frame, K frames
that a causal convolution keeps; f is F, or 1 if all frames share a timestep.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


def missing_for_kernels(device: torch.device) -> str | None:
    """Describe the requirement of the kernels that this device lacks; None if they can run."""
    if find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"a CUDA device, not {device}"


def _kernels() -> ModuleType:
    """Import the kernels, which need triton."""
    from model import fused_kernels

    return fused_kernels


def norm_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``layer_norm(x) (1 + scale) + shift``: x [B F T C], shift and scale [B f 1 C] -> [B F T C]."""
    return _norm_modulated(x, *_for_frames(x, shift, scale), eps)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    offset: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the hidden states, and norm the sum for the next branch.

    Args:
        x, branch: [B F T C].
        gate: factor of the branch [B f 1 C]; None is 1.
        shift, scale: [B f 1 C], or weights of a norm [C].
        offset: added to ``scale``: 1 for modulation, 0 for the weights of a norm.

    Returns:
        ``x + gate branch`` and ``layer_norm(x + gate branch) (offset + scale) + shift``, [B F T C] each.
    """
    gates = None if gate is None else _for_frames(x, gate)[0]
    return _residual_norm(x, branch, gates, *_for_frames(x, shift, scale), eps, offset)


def split_qkv(
    qkv: Tensor,
    norm: Tensor,
    rotary: Tensor,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Norm and rotate q and k, return q, and write k and v into slots of a cache.

    Args:
        qkv: joint product [B F T 3C].
        norm: weights of the RMS norms of q and k over the model dim [2 C].
        rotary: as made by :func:`model.rope.rotary_table`, [F T 1 D/2 2] or [B F T 1 D/2 2].
        index: the slot of each frame [F], int64.
        keys, values: buffers [B slots T N D]; the slots ``index`` are overwritten.

    Returns:
        q [B F T N D].
    """
    table = rotary.flatten(-3).expand(qkv.shape[0], *qkv.shape[1:3], -1)
    return _split_qkv(qkv, norm, table, index, keys, values, num_heads, eps)


def _for_frames(x: Tensor, *signals: Tensor) -> list[Tensor]:
    """View signals [B f 1 C] or [C] as [B F C], for hidden states x [B F T C]."""
    views = [signal if signal.ndim == 1 else signal.squeeze(2) for signal in signals]
    return [view.expand(x.shape[0], x.shape[1], -1) for view in views]


@torch.library.custom_op("self_forcing::norm_modulated", mutates_args=())
def _norm_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    kernels = _kernels()
    out, signals = torch.empty_like(x, memory_format=torch.contiguous_format), _channels_dense(shift, scale)
    with kernels.on_device(x):
        kernels.norm(x.contiguous(), None, None, *signals, None, out, eps=eps, offset=1.0)
    return out


@_norm_modulated.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("self_forcing::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    gates = None if gate is None else _channels_dense(gate)[0]
    signals = _channels_dense(shift, scale)
    with kernels.on_device(x):
        kernels.norm(x.contiguous(), branch.contiguous(), gates, *signals, total, out, eps=eps, offset=offset)
    return total, out


@_residual_norm.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return total, out


@torch.library.custom_op("self_forcing::split_qkv", mutates_args=("keys", "values"))
def _split_qkv(
    qkv: Tensor, norm: Tensor, table: Tensor, index: Tensor, keys: Tensor, values: Tensor, num_heads: int, eps: float
) -> Tensor:
    kernels = _kernels()
    q = _queries(qkv, num_heads)
    assert keys.is_contiguous() and values.is_contiguous()
    joint, turns = _channels_dense(qkv, table)
    with kernels.on_device(qkv):
        kernels.split_qkv(joint, norm.contiguous(), turns, index, q, keys, values, eps=eps)
    return q


@_split_qkv.register_fake
def _(
    qkv: Tensor, norm: Tensor, table: Tensor, index: Tensor, keys: Tensor, values: Tensor, num_heads: int, eps: float
) -> Tensor:
    return _queries(qkv, num_heads)


def _queries(qkv: Tensor, num_heads: int) -> Tensor:
    """Return an empty tensor for queries [B F T N D]."""
    return qkv.new_empty(*qkv.shape[:3], num_heads, qkv.shape[3] // (3 * num_heads))


def _channels_dense(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors. Those whose last dimension is not dense are copied."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("self_forcing::norm_silu", mutates_args=("memory",))
def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, memory: Tensor, floor: float) -> Tensor:
    """Fill the buffer of a causal convolution: its past, then ``silu(gamma rms_norm(x + bias))``.

    Args:
        x: [T H W C].
        bias: [C] of the convolution that made x and left it out; None is 0.
        gamma: weights of the norm [C].
        memory: the frames kept [K H W C]; afterwards the last K frames of the buffer.
        floor: the smallest length of a position's vector.

    Returns:
        [K+T H W C].
    """
    kernels = _kernels()
    assert memory.is_contiguous()
    buffer = _buffer(x, memory)
    with kernels.on_device(x):
        kernels.norm_silu(x.contiguous(), bias, gamma.contiguous(), memory, buffer, floor=floor)
    return buffer


@norm_silu.register_fake
def _(x: Tensor, bias: Tensor | None, gamma: Tensor, memory: Tensor, floor: float) -> Tensor:
    return _buffer(x, memory)


def _buffer(x: Tensor, memory: Tensor) -> Tensor:
    """Return an empty tensor for the kept frames [K H W C], followed by those of x [T H W C]."""
    return x.new_empty(memory.shape[0] + x.shape[0], *x.shape[1:])


@torch.library.custom_op("self_forcing::add_shortcut", mutates_args=())
def add_shortcut(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
    """``x + bias + shortcut``: x and shortcut [T H W C], bias [C] of the convolution that made x and left it out."""
    kernels = _kernels()
    out = x.new_empty(x.shape)
    with kernels.on_device(x):
        kernels.add_shortcut(x.contiguous(), bias, shortcut.contiguous(), out)
    return out


@add_shortcut.register_fake
def _(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
    return x.new_empty(x.shape)
