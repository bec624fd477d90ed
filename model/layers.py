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
from model.kv_cache import CachedText
from model.layer_cache import ChunkSlots, LayerCache
from model.rope import apply_rotary

T = TypeVar("T")

RECOMPUTED = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Run a module; backward computes its activations again. A block is not random, so no random state is stored."""


def _call(module: Callable[..., T], *args, **options) -> T:
    return module(*args, **options)


class PatchEmbedding(nn.Conv3d):
    """Turns latents into tokens. Patches do not overlap, so the convolution is one product of rearranged latents."""

    def forward(self, latents: Tensor) -> Tensor:
        """Turn latents [B F c H W] into tokens [B F T C]."""
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
        """Return ``norm(x) (1 + scale) + shift``: x [B F T C], shift and scale [B f 1 C]. The norm has no weights."""
        if shift.numel() == x.shape[-1]:  # equal for all tokens: use them as the weights, in one operation
            weight, bias = (1 + scale).float().flatten(), shift.float().flatten()
            return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return torch.addcmul(shift, self(x), 1 + scale)


class GELU(nn.Module):
    """The tanh approximation of GELU.

    It is computed as ``x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))``. This is the same function and three times faster
    on a CPU.
    """

    LINEAR = 2 * (2 / math.pi) ** 0.5
    CUBIC = 0.044715 * LINEAR

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        slope = torch.addcmul(x.new_full((), self.LINEAR), x, x, value=self.CUBIC)
        return slope.mul_(x).sigmoid_().mul_(x)


class Attention(nn.Module):
    """The projections of self- and cross-attention. q and k are RMS-normed over the whole model dim."""

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
        """Split [... C] into heads [... N D]."""
        return x.unflatten(-1, (self.num_heads, -1))


class FusedProjection(nn.Module):
    """Computes q, k and v of a :class:`SelfAttention` in one product, then normalises and rotates q and k.

    It is for inference. It replaces q, k, v, norm_q and norm_k, but its ``state_dict`` keeps their names and shapes.
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
        """Project x [B F T C] to q, k, v [B F T N D]. q and k are normed and rotated."""
        return split_heads(self.qkv(x), self.norm, rotary, num_heads=self.num_heads, eps=self.eps)


def split_heads(
    qkv: Tensor, norm: Tensor, rotary: Tensor, *, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the product qkv [B F T 3C] into q, k, v [B F T N D]. Norm q and k by their weights [2 C]; rotate both."""
    parts = qkv.unflatten(-1, (3, -1))
    if torch.compiler.is_compiling():  # apart, norm, rotation and cache write become one kernel; together they do not
        q, k, v = parts.unbind(-2)
        q, k = (F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) for x in (q, k))
        q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q * norm[0], k * norm[1], v))
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v
    qk = parts[..., :2, :].float()
    mean_square = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square() / qk.shape[-1]
    qk = (qk * (mean_square + eps).rsqrt()).to(qkv.dtype) * norm
    q, k = apply_rotary(qk.flatten(-2).unflatten(-1, (2 * num_heads, -1)), rotary).chunk(2, dim=-2)
    return q, k, parts[..., 2, :].unflatten(-1, (num_heads, -1))


def _split_names(module: FusedProjection, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Rename a fused projection in a state dict: its parts get the names of the original layers."""
    outer = prefix.removesuffix("fused.")
    for part in ("weight", "bias"):
        for name, tensor in zip(module.NAMES, state.pop(f"{prefix}qkv.{part}").chunk(3), strict=True):
            state[f"{outer}{name}.{part}"] = tensor
    for name, tensor in zip(module.NAMES, state.pop(f"{prefix}norm"), strict=False):
        state[f"{outer}norm_{name}.weight"] = tensor


class VideoAttention(nn.Module):
    """Computes self-attention from q, k and v: over the whole clip, with a mask, or with a KV cache.

    It has no parameters. It is a module so that hooks can exchange its inputs and outputs between processes.
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
        """Attend with q, k, v [B F T N D]. The result is [B output_frames T N D], for the last frames.

        With a cache, each of ``chunks`` attends to itself and to its visible frames in the cache.
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
    """Self-attention over the video."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, num_heads, eps)
        self.core = VideoAttention()
        self.fused: FusedProjection | None = None
        self.joins_parts = False

    def fuse(self, *, keep_parts: bool = False) -> None:
        """Project q, k and v in one product from now on. For inference.

        Args:
            keep_parts: keep the weights of q, k and v apart, and join them for each product. Streamed weights need
                this, because they exist only while the layer computes. The result is the same to the last bit.
        """
        if keep_parts:
            self.joins_parts = True
        elif self.fused is None:
            self.fused = FusedProjection(self)
            del self.q, self.k, self.v, self.norm_q, self.norm_k

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B F T C] to q, k, v [B F T N D]. q and k are normed and rotated."""
        if self.fused is not None:
            return self.fused(x, rotary)
        if self.joins_parts:
            return self.project_joined(x, rotary)
        q = apply_rotary(self.heads(self.norm_q(self.q(x))), rotary)
        k = apply_rotary(self.heads(self.norm_k(self.k(x))), rotary)
        return q, k, self.heads(self.v(x))

    def project_joined(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like :meth:`project`, but join the weights for this one product."""
        linears = (self.q, self.k, self.v)
        weight = torch.cat([linear.weight for linear in linears])
        qkv = F.linear(x, weight, torch.cat([linear.bias for linear in linears]))
        norm = torch.stack([self.norm_q.weight, self.norm_k.weight])
        return split_heads(qkv, norm, rotary, num_heads=self.num_heads, eps=self.norm_q.eps)

    def forward(self, x: Tensor, rotary: Tensor, **options) -> Tensor:
        """Attend: x [B F T C] -> [B output_frames T C].

        ``rotary`` comes from :func:`model.rope.rotary_table`. The options are those of :class:`VideoAttention`.
        """
        out = self.core(*self.project(x, rotary), **options)
        return self.o(out.flatten(-2)) if out.shape[1] else out.flatten(-2)


class CrossAttention(Attention):
    """Cross-attention to the prompt. Padded text tokens take part, as in Wan's training."""

    def key_value(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B L N D] of embedded text [B L C]."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def forward(self, x: Tensor, text: CachedText, *, backend: AttentionBackend) -> Tensor:
        """Let x [B F T C] attend to the keys and values of a prompt. Returns [B F T C]."""
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q.flatten(1, 2), text.k, text.v, bias=text.bias, backend=backend.for_text())
        return self.o(out.flatten(-2).view_as(x))


class Block(nn.Module):
    """One transformer block. The timestep of each frame gives shift, scale and gate of both branches."""

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
        """Apply the block to x [B F T C] with modulation [B f 6 C]. Returns the last ``output_frames`` frames, or all.

        ``cache`` is the cache of this one block, so one compiled block can be used for every layer.
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
    """All blocks in sequence. It is a module so that it can be compiled, or get hooks, as a whole."""

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
        """Return the hidden states after each block in ``kept`` (ascending). The last has ``output_frames`` frames.

        Args:
            x, modulation, rotary, mask, chunks, backend: as in :meth:`Block.forward`.
            texts: one for each block: embedded text [B L C], or its keys and values.
            caches: one for each block.
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
            if isinstance(text, Tensor):  # not in the block: these layers may be sharded apart
                text = CachedText(*run(block.cross_attn.key_value, text), None)
            x = run(block, x, modulation, text, rotary, **options)
            if layer in kept:
                outputs.append(x)
        return outputs


class Head(nn.Module):
    """A modulated projection from tokens to patches."""

    def __init__(self, dim: int, patch_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = random_modulation(2, dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Project x [B F T C] with time embedding [B f C] to [B F T patch_dim]."""
        shift, scale = (self.modulation + embedding.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(self.norm.modulated(x, shift, scale))


def random_modulation(rows: int, dim: int) -> nn.Parameter:
    """Draw [1 rows C], uniform with variance ``1 / dim``. Normal draws on the meta device cost seconds of imports."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, rows, dim).uniform_(-bound, bound))


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Embed timesteps [...] as [... dim] float32: first cosines, then sines, at ``10000^(-i / (dim / 2))``."""
    precision = torch.float32 if timesteps.device.type == "mps" else torch.float64
    half = dim // 2
    exponent = torch.arange(half, dtype=precision, device=timesteps.device) / half
    angles = timesteps.to(precision)[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
