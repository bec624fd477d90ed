"""Layers of the Wan2.1 diffusion transformer, with the original parameter names.

Shapes: B batch, F frames, T tokens a frame, C model dim, N heads, D head dim, L text tokens.
Hidden states stay [B F T C], so that the modulation of a frame, [B F 1 C], broadcasts over its tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionBackend, BlockMask, attention
from model.kv_cache import KeyValue, KVCache
from model.rope import apply_rotary


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections shared by self- and cross-attention; q and k are RMS-normed over the whole model dim."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        """[... C] -> [... N D]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention over the video: bidirectional, masked, or against a KV cache."""

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        mask: BlockMask | None,
        cache: KVCache | None,
        layer: int,
        start_frame: int,
        backend: AttentionBackend,
    ) -> Tensor:
        """x [B F T C] -> [B F T C]; ``rotary`` as made by :func:`model.rope.rotary_table`."""
        q = apply_rotary(self.heads(self.norm_q(self.q(x))), rotary)
        k = apply_rotary(self.heads(self.norm_k(self.k(x))), rotary)
        v = self.heads(self.v(x))
        if cache is None:
            k, v = k.flatten(1, 2), v.flatten(1, 2)
        else:
            k, v = cache.extend(layer, k, v, start_frame)
        out = attention(q.flatten(1, 2), k, v, mask=mask, backend=backend)
        return self.o(out.flatten(-2).view_as(x))


class CrossAttention(Attention):
    """Attention to the prompt; padded text tokens are attended to, as Wan was trained."""

    def key_value(self, text: Tensor) -> KeyValue:
        """Keys and values [B L N D] of embedded text [B L C]."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def forward(self, x: Tensor, text: Tensor | KeyValue, *, backend: AttentionBackend) -> Tensor:
        """x [B F T C]; ``text`` is embedded text [B L C], or its keys and values."""
        k, v = text if isinstance(text, tuple) else self.key_value(text)
        q = self.heads(self.norm_q(self.q(x)))
        return self.o(attention(q.flatten(1, 2), k, v, backend=backend).flatten(-2).view_as(x))


class Block(nn.Module):
    """One transformer block; shift, scale and gate of both branches come from the timestep of each frame."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | KeyValue,
        rotary: tuple[Tensor, Tensor],
        *,
        mask: BlockMask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        start_frame: int = 0,
        backend: AttentionBackend = AttentionBackend.auto,
    ) -> Tensor:
        """x [B F T C], modulation [B F 6 C] -> [B F T C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unsqueeze(3).unbind(2)
        attended = self.self_attn(
            modulate(self.norm1(x), shift1, scale1),
            rotary,
            mask=mask,
            cache=cache,
            layer=layer,
            start_frame=start_frame,
            backend=backend,
        )
        x = torch.addcmul(x, attended, gate1)
        x = x + self.cross_attn(self.norm3(x), text, backend=backend)
        return torch.addcmul(x, self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)


class Head(nn.Module):
    """Modulated projection of tokens to patches."""

    def __init__(self, dim: int, patch_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B F T C], time embedding [B F C] -> [B F T patch_dim]."""
        shift, scale = (self.modulation + embedding.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``."""
    return torch.addcmul(shift, x, 1 + scale)


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines of timesteps at frequencies ``10000^(-i / (dim / 2))``: [...] -> [... dim] float32."""
    precision = torch.float32 if timesteps.device.type == "mps" else torch.float64
    half = dim // 2
    exponent = torch.arange(half, dtype=precision, device=timesteps.device) / half
    angles = timesteps.to(precision)[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
