"""The kernels that compute attention: which of them can run here, and how each is called.

A choice of kernel belongs to one call. Nothing here changes a setting of the process, so two threads may use different
kernels at the same time.

Shapes: B batch, L query tokens, S key tokens, N heads, D head dim.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.eight_bits import fp8_attention, int8_attention
from utils.errors import UserError

HALF_PRECISION = (torch.float16, torch.bfloat16)


class AttentionBackend(Enum):
    """Which kernel computes attention."""

    auto = "auto"
    """The fastest kernel in full precision that can run here: the first of flash4, flash3, cudnn, flash, sdpa."""
    flash4 = "flash4"
    """FlashAttention-4 (pip install flash-attn-4), Hopper and later. Attention to prompts uses cudnn, which is faster
    with few keys."""
    flash3 = "flash3"
    """FlashAttention-3 (package flash_attn_interface), Hopper."""
    cudnn = "cudnn"
    """The attention of cuDNN, Hopper and later."""
    flash = "flash"
    """FlashAttention-2 (pip install flash-attn), Ampere and later."""
    sage = "sage"
    """SageAttention: products in 8 bits, faster and less exact. It is for inference only, and auto never picks it."""
    int8 = "int8"
    """q and k in 8-bit integers, as in SageAttention, written out in torch. It runs on any device and is slow: it shows
    the quality of such products. For inference only."""
    fp8 = "fp8"
    """Like int8, and the products with v in 8-bit floats, as in SageAttention2, which ``sage`` is on Hopper."""
    sdpa = "sdpa"
    """The kernel that torch chooses. It runs on any device."""

    @property
    def has_8_bits(self) -> bool:
        """True if products are computed in 8 bits. Such a kernel has no backward pass."""
        return self in (AttentionBackend.sage, *WRITTEN_OUT)

    def for_text(self) -> AttentionBackend:
        """Return the kernel for attention to a prompt, which has few keys."""
        return AttentionBackend.cudnn if self is AttentionBackend.flash4 else self


WRITTEN_OUT = {AttentionBackend.int8: int8_attention, AttentionBackend.fp8: fp8_attention}
"""Attention in 8 bits by ordinary operations."""


class KernelNeed(NamedTuple):
    """The requirements of a kernel."""

    capability: tuple[int, int]
    """The lowest compute capability of an NVIDIA GPU."""
    module: str | None = None
    """The Python module that contains the kernel; None is torch."""
    function: str = ""
    """Its function in that module: (q, k, v) [B L N D] -> [B L N D]."""
    head_dim: int = 256
    """The largest head dim; every head dim must be a multiple of 8."""


NEEDS = {
    AttentionBackend.flash4: KernelNeed((9, 0), "flash_attn.cute", "flash_attn_func", 128),
    AttentionBackend.flash3: KernelNeed((9, 0), "flash_attn_interface", "flash_attn_func"),
    AttentionBackend.cudnn: KernelNeed((9, 0), head_dim=128),
    AttentionBackend.flash: KernelNeed((8, 0), "flash_attn.flash_attn_interface", "flash_attn_func"),
    AttentionBackend.sage: KernelNeed((8, 0), "sageattention", "sageattn", 128),
}
ORDER = (AttentionBackend.flash4, AttentionBackend.flash3, AttentionBackend.cudnn, AttentionBackend.flash)
"""The order in which ``auto`` tries the kernels. On an H200, FlashAttention-4 reached 645 TFLOP/s and cuDNN 518."""


@lru_cache
def resolve_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """Return the kernel that computes attention for tensors of this device and dtype.

    Raises:
        UserError: the requested kernel cannot run here.
    """
    if backend is AttentionBackend.auto:
        return next((one for one in ORDER if missing(one, device, dtype) is None), AttentionBackend.sdpa)
    lacking = missing(backend, device, dtype)
    if lacking:
        raise UserError(f"attention kernel {backend.value!r} needs {lacking}; use auto or sdpa")
    return backend


def missing(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Describe the requirement that is missing for a kernel; None if it can run."""
    if backend in (AttentionBackend.sdpa, AttentionBackend.auto, *WRITTEN_OUT):
        return None
    need = NEEDS[backend]
    if device.type != "cuda" or dtype not in HALF_PRECISION:
        return f"a CUDA device and half precision, not {device} and {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < need.capability:
        return f"an NVIDIA GPU of capability {need.capability} or more, not {capability}"
    if need.module is not None and not _installed(need.module):
        return f"the package {need.module}, which is not installed"
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # the package around it is absent or broken
        return False


def run_kernel(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the attention [B L N D] of q [B L N D] to k, v [B S N D]. Every key is visible.

    ``backend`` comes from :func:`resolve_backend`. If the kernel cannot take these tensors (float32, a large head
    dim), ``sdpa`` computes them.
    """
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiable and backend.has_8_bits:
        raise UserError(
            f"attention kernel {backend.value!r} has no backward pass; use auto, flash or cudnn for training"
        )
    if backend in WRITTEN_OUT:
        return WRITTEN_OUT[backend](q, k, v)
    if backend not in NEEDS or not takes(backend, q):
        return sdpa(q, k, v)
    if backend is AttentionBackend.cudnn:
        return _cudnn(q, k, v, differentiable)
    if not differentiable:
        return packaged_attention(q, k, v, backend.value)
    return _packaged(q, k, v, backend.value)


def takes(backend: AttentionBackend, q: Tensor) -> bool:
    """Return whether a kernel supports the dtype and head dim of q."""
    return q.dtype in HALF_PRECISION and q.shape[-1] % 8 == 0 and q.shape[-1] <= NEEDS[backend].head_dim


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute attention of [B L N D] with torch. ``bias`` [B 1 1 S] is added to the logits."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, differentiable: bool) -> Tensor:
    """Call the operator directly: ``sdpa_kernel`` would affect all threads. Backward needs the logsumexp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, differentiable, 0.0, False, False)
    return out[0].transpose(1, 2)


def _packaged(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Call the function of the package."""
    need = NEEDS[AttentionBackend(backend)]
    options = {"tensor_layout": "NHD"} if backend == AttentionBackend.sage.value else {}
    out = getattr(import_module(need.module), need.function)(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out  # some releases return the logsumexp too


@torch.library.custom_op("self_forcing::packaged_attention", mutates_args=())
def packaged_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Compute attention with the package of a kernel, as one operator in compiled graphs. It has no backward."""
    return _packaged(q, k, v, backend).contiguous()


@packaged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return q.new_empty(q.shape)
