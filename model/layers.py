"""Layers of the Wan2.1 diffusion transformer, with the original parameter names.

Shapes: B batch, F frames, T tokens a frame, C model dim, N heads, D head dim, L text tokens; f is F, or 1 if all
frames share one timestep. Hidden states stay [B F T C], so that the modulation of a frame, [B f 1 C], broadcasts over
its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionBackend, BlockMask, FlexMask, attention
from model.fused import can_fuse
from model.kv_cache import CachedText
from model.layer_cache import ChunkSlots, LayerCache
from model.rope import apply_rotary

T = TypeVar("T")

RECOMPUTED = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Run a module whose activations backward computes again. Nothing in a block is random, so no random state is kept."""


def _call(module: Callable[..., T], *args, **options) -> T:
    return module(*args, **options)


class PatchEmbedding(nn.Conv3d):
    """Latents to tokens. The patches do not overlap, so the convolution is a matrix product of rearranged latents."""

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B F c H W] -> [B F T C]."""
        _, rows, columns = self.kernel_size
        patches = rearrange(latents, "b f c (h p) (w q) -> b f (h w) (c p q)", p=rows, q=columns)
        return F.linear(patches, self.weight.flatten(1), self.bias)


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

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """``norm(x) (1 + scale) + shift``: x [B F T C], shift and scale [B f 1 C]; without weights of its own."""
        if can_fuse(x):
            from model.triton_kernels import layer_norm_modulate

            return layer_norm_modulate(x, shift, scale, eps=self.eps)
        if shift.numel() == x.shape[-1]:  # the same for every token, so it can be the weights: one operation
            weight, bias = (1 + scale).float().flatten(), shift.float().flatten()
            return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return torch.addcmul(shift, self(x), 1 + scale)


class GELU(nn.Module):
    """The tanh approximation of GELU.

    As ``x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))``, the same function, it is three times faster on a CPU.
    """

    LINEAR = 2 * (2 / math.pi) ** 0.5
    CUBIC = 0.044715 * LINEAR

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        slope = torch.addcmul(x.new_full((), self.LINEAR), x, x, value=self.CUBIC)
        return slope.mul_(x).sigmoid_().mul_(x)


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


class FusedProjection(nn.Module):
    """q, k and v of a :class:`SelfAttention` in one product, norms and rotation of q and k in one operation each.

    For inference: it takes the place of q, k, v, norm_q and norm_k, whose names and shapes its ``state_dict`` keeps.
    """

    NAMES = ("q", "k", "v")

    def __init__(self, layer: SelfAttention) -> None:
        super().__init__()
        linears = [getattr(layer, name) for name in self.NAMES]
        self.num_heads, self.eps = layer.num_heads, layer.norm_q.eps
        with torch.device("meta"):
            self.qkv = nn.Linear(linears[0].in_features, 3 * linears[0].out_features)
        self.qkv.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.qkv.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        self.norm = nn.Parameter(torch.stack([layer.norm_q.weight, layer.norm_k.weight]), requires_grad=False)
        self.register_state_dict_post_hook(_split_names)

    def forward(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B F T C] -> q, k, v [B F T N D], q and k normed and rotated."""
        return split_heads(self.qkv(x), self.norm, rotary, num_heads=self.num_heads, eps=self.eps)


def split_heads(
    qkv: Tensor, norm: Tensor, rotary: Tensor, *, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint product qkv [B F T 3C], norm weights [2 C] of q and k -> q, k, v [B F T N D]; q and k normed, rotated."""
    parts = qkv.unflatten(-1, (3, -1))
    if can_fuse(qkv) and qkv.is_contiguous():
        from model.triton_kernels import norm_rotary

        q, k = norm_rotary(parts, norm, rotary, num_heads=num_heads, eps=eps)
        return q, k, parts[..., 2, :].unflatten(-1, (num_heads, -1))
    qk = parts[..., :2, :].float()
    mean_square = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square() / qk.shape[-1]
    qk = (qk * (mean_square + eps).rsqrt()).to(qkv.dtype) * norm
    q, k = apply_rotary(qk.flatten(-2).unflatten(-1, (2 * num_heads, -1)), rotary).chunk(2, dim=-2)
    return q, k, parts[..., 2, :].unflatten(-1, (num_heads, -1))


def _split_names(module: FusedProjection, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Give a fused projection's part of a state dict the names of the layers it was made from."""
    outer = prefix.removesuffix("fused.")
    for part in ("weight", "bias"):
        for name, tensor in zip(module.NAMES, state.pop(f"{prefix}qkv.{part}").chunk(3), strict=True):
            state[f"{outer}{name}.{part}"] = tensor
    for name, tensor in zip(module.NAMES, state.pop(f"{prefix}norm"), strict=False):
        state[f"{outer}norm_{name}.weight"] = tensor


class VideoAttention(nn.Module):
    """The products of self-attention: over the whole clip, under a mask, or against a KV cache.

    A module without parameters, so that hooks can exchange its inputs and outputs between processes.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: BlockMask | FlexMask | None,
        cache: LayerCache | None,
        chunks: Sequence[ChunkSlots],
        output_frames: int,
        backend: AttentionBackend,
    ) -> Tensor:
        """q, k, v [B F T N D] -> [B output_frames T N D], the last frames.

        With a cache, each of ``chunks`` attends to itself and to what the cache shows it.
        """
        if cache is None:
            out = attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask=mask, backend=backend)
            return out.unflatten(1, q.shape[1:3])[:, q.shape[1] - output_frames :]
        outputs, start = [q[:, :0]], 0
        for chunk in chunks:
            part = slice(start, start + chunk.frames)
            keys, values = cache.extend(k[:, part], v[:, part], chunk)
            if start >= q.shape[1] - output_frames:
                out = attention(q[:, part].flatten(1, 2), keys, values, backend=backend)
                outputs.append(out.unflatten(1, (chunk.frames, -1)))
            start += chunk.frames
        return outputs[-1] if len(outputs) <= 2 else torch.cat(outputs, dim=1)


class SelfAttention(Attention):
    """Attention over the video."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, num_heads, eps)
        self.core = VideoAttention()
        self.fused: FusedProjection | None = None
        self.joins_parts = False

    def fuse(self, *, keep_parts: bool = False) -> None:
        """Project q, k and v in one product from now on; for inference.

        Args:
            keep_parts: leave the weights of q, k and v apart and join them for each product, because streamed weights
                are there only while the layer computes. The result is the same to the last bit.
        """
        if keep_parts:
            self.joins_parts = True
        elif self.fused is None:
            self.fused = FusedProjection(self)
            del self.q, self.k, self.v, self.norm_q, self.norm_k

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B F T C] -> q, k, v [B F T N D], q and k normed and rotated."""
        if self.fused is not None:
            return self.fused(x, rotary)
        if self.joins_parts:
            return self.project_joined(x, rotary)
        q = apply_rotary(self.heads(self.norm_q(self.q(x))), rotary)
        k = apply_rotary(self.heads(self.norm_k(self.k(x))), rotary)
        return q, k, self.heads(self.v(x))

    def project_joined(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`project`, with the weights joined for this one product."""
        linears = (self.q, self.k, self.v)
        weight = torch.cat([linear.weight for linear in linears])
        qkv = F.linear(x, weight, torch.cat([linear.bias for linear in linears]))
        norm = torch.stack([self.norm_q.weight, self.norm_k.weight])
        return split_heads(qkv, norm, rotary, num_heads=self.num_heads, eps=self.norm_q.eps)

    def forward(self, x: Tensor, rotary: Tensor, **options) -> Tensor:
        """x [B F T C] -> [B output_frames T C].

        ``rotary`` as made by :func:`model.rope.rotary_table`, options as :class:`VideoAttention` takes them.
        """
        out = self.core(*self.project(x, rotary), **options)
        return self.o(out.flatten(-2)) if out.shape[1] else out.flatten(-2)


class CrossAttention(Attention):
    """Attention to the prompt; padded text tokens are attended to, as Wan was trained."""

    def key_value(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B L N D] of embedded text [B L C]."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def forward(self, x: Tensor, text: CachedText, *, backend: AttentionBackend) -> Tensor:
        """x [B F T C] attends to the keys and values of a prompt -> [B F T C]."""
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q.flatten(1, 2), text.k, text.v, bias=text.bias, backend=backend.for_text())
        return self.o(out.flatten(-2).view_as(x))


class Block(nn.Module):
    """One transformer block; shift, scale and gate of both branches come from the timestep of each frame."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), GELU(), nn.Linear(ffn_dim, dim))
        self.modulation = random_modulation(6, dim)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: CachedText,
        rotary: Tensor,
        *,
        mask: BlockMask | FlexMask | None = None,
        cache: LayerCache | None = None,
        chunks: Sequence[ChunkSlots] = (),
        output_frames: int | None = None,
        backend: AttentionBackend = AttentionBackend.auto,
    ) -> Tensor:
        """x [B F T C], modulation [B f 6 C] -> [B F T C], or only the last ``output_frames`` frames of it.

        ``cache`` is the cache of this block alone: a compiled block then serves every layer.
        """
        frames = x.shape[1]
        wanted = frames if output_frames is None else output_frames
        signals = self.modulation + modulation
        shift, scale, gate = signals[:, :, :3, None].unbind(2)
        attended = self.self_attn(
            self.norm1.modulated(x, shift, scale),
            rotary,
            mask=mask,
            cache=cache,
            chunks=chunks,
            output_frames=wanted,
            backend=backend,
        )
        if wanted < frames:
            x = x[:, frames - wanted :]
            if wanted == 0:
                return x
            if signals.shape[1] > 1:
                signals, gate = signals[:, frames - wanted :], gate[:, frames - wanted :]
        x = torch.addcmul(x, attended, gate)
        x = x + self.cross_attn(self.norm3(x), text, backend=backend)
        shift, scale, gate = signals[:, :, 3:, None].unbind(2)
        return torch.addcmul(x, self.ffn(self.norm2.modulated(x, shift, scale)), gate)


class BlockStack(nn.ModuleList):
    """All blocks in a row. It is a module, so that it can be compiled or given hooks as a whole."""

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        texts: Sequence[Tensor | CachedText],
        rotary: Tensor,
        *,
        mask: BlockMask | FlexMask | None,
        caches: Sequence[LayerCache | None],
        chunks: Sequence[ChunkSlots],
        output_frames: int,
        backend: AttentionBackend,
        kept: Sequence[int],
        checkpointing: bool,
    ) -> list[Tensor]:
        """Hidden states after each of the blocks ``kept``, ascending; the last block gives ``output_frames`` frames.

        Args:
            x, modulation, rotary, mask, chunks, backend: as :meth:`Block.forward`.
            texts: one a block: embedded text [B L C], or its keys and values.
            caches: one a block.
            checkpointing: recompute blocks in backward.
        """
        outputs, last = [], len(self) - 1
        for layer, block in enumerate(self):
            options = {
                "mask": mask,
                "cache": caches[layer],
                "chunks": chunks,
                "output_frames": output_frames if layer == last else x.shape[1],
                "backend": backend,
            }
            run = RECOMPUTED if checkpointing else _call
            text = texts[layer]
            if isinstance(text, Tensor):  # outside the block: its layers may be sharded apart, for caches of a prompt
                text = CachedText(*run(block.cross_attn.key_value, text), None)
            x = run(block, x, modulation, text, rotary, **options)
            if layer in kept:
                outputs.append(x)
        return outputs


class Head(nn.Module):
    """Modulated projection of tokens to patches."""

    def __init__(self, dim: int, patch_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = random_modulation(2, dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B F T C], time embedding [B f C] -> [B F T patch_dim]."""
        shift, scale = (self.modulation + embedding.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(self.norm.modulated(x, shift, scale))


def random_modulation(rows: int, dim: int) -> nn.Parameter:
    """[1 rows C] of variance ``1 / dim``; uniform, as normal numbers on the meta device cost seconds of imports."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, rows, dim).uniform_(-bound, bound))


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines of timesteps at frequencies ``10000^(-i / (dim / 2))``: [...] -> [... dim] float32."""
    precision = torch.float32 if timesteps.device.type == "mps" else torch.float64
    half = dim // 2
    exponent = torch.arange(half, dtype=precision, device=timesteps.device) / half
    angles = timesteps.to(precision)[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
