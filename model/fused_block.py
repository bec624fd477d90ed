"""A transformer block that computes with the operators of :mod:`model.fused_ops`; for inference.

Shapes: B batch, F frames, T tokens a frame, C model dim, N heads, D head dim; f is F, or 1 if all frames share a
timestep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention import AttentionBackend, BlockMask, FlexMask, attention
from model.fused_ops import norm_modulated, residual_norm, split_qkv
from model.kv_cache import CachedText
from model.layer_cache import ChunkSlots, LayerCache
from model.layers import Block


class FusedBlock(Block):
    """A :class:`Block` with the same parameters, in four kernels beside its products and attention.

    1. norm and modulation,
    2. RMS norm of q and k, their rotation, and the write of k and v into the cache,
    3. gate, residual and the norm before attention to the prompt,
    4. residual, norm and modulation before the feed-forward layer.

    The last residual is one operation in torch already. Call ``block.self_attn.fuse()`` before.
    """

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.modulation = block.modulation

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
        """As :meth:`Block.forward`."""
        frames = x.shape[1]
        wanted = frames if output_frames is None else output_frames
        signals = self.modulation + modulation
        shift, scale, gate = signals[:, :, :3, None].unbind(2)
        normed = norm_modulated(x, shift, scale, self.norm1.eps)
        attended = self._attend(
            normed, rotary, mask=mask, cache=cache, chunks=chunks, output_frames=wanted, backend=backend
        )
        if wanted < frames:
            x = x[:, frames - wanted :]
            if wanted == 0:
                return x
            if signals.shape[1] > 1:
                signals, gate = signals[:, frames - wanted :], gate[:, frames - wanted :]
        prompt_norm = self.norm3
        x, normed = residual_norm(x, attended, gate, prompt_norm.bias, prompt_norm.weight, prompt_norm.eps, offset=0.0)
        crossed = self.cross_attn(normed, text, backend=backend)
        shift, scale, gate = signals[:, :, 3:, None].unbind(2)
        x, normed = residual_norm(x, crossed, None, shift, scale, self.norm2.eps)
        return torch.addcmul(x, self.ffn(normed), gate)

    def _attend(
        self,
        x: Tensor,
        rotary: Tensor,
        *,
        mask: BlockMask | FlexMask | None,
        cache: LayerCache | None,
        chunks: Sequence[ChunkSlots],
        output_frames: int,
        backend: AttentionBackend,
    ) -> Tensor:
        """Self-attention of x [B F T C] -> [B output_frames T C]."""
        layer = self.self_attn
        qkv = layer.fused.qkv(x)
        if writes_directly(qkv, cache, chunks, layer.num_heads):
            out = self._attend_to_cache(qkv, rotary, cache, chunks, output_frames, backend)
        else:
            keys, values = (qkv.new_empty(*qkv.shape[:3], *self._head_shape()) for _ in range(2))
            every = torch.arange(qkv.shape[1], device=qkv.device)
            q = self._split(qkv, rotary, every, keys, values)
            options = {"mask": mask, "cache": cache, "chunks": chunks}
            out = layer.core(q, keys, values, **options, output_frames=output_frames, backend=backend)
        return layer.o(out.flatten(-2)) if out.shape[1] else out.flatten(-2)

    def _attend_to_cache(
        self,
        qkv: Tensor,
        rotary: Tensor,
        cache: LayerCache,
        chunks: Sequence[ChunkSlots],
        output_frames: int,
        backend: AttentionBackend,
    ) -> Tensor:
        """As :class:`model.layers.VideoAttention`; k and v go from the joint product qkv straight to their slots."""
        outputs, start = [qkv.new_empty(qkv.shape[0], 0, qkv.shape[2], *self._head_shape())], 0
        for chunk in chunks:
            part = slice(start, start + chunk.frames)
            q = self._split(qkv[:, part], rotary[..., part, :, :, :, :], chunk.index, cache.k.data, cache.v.data)
            if start >= qkv.shape[1] - output_frames:
                out = attention(q.flatten(1, 2), *cache.read(chunk, q.dtype), backend=backend)
                outputs.append(out.unflatten(1, (chunk.frames, -1)))
            start += chunk.frames
        return outputs[-1] if len(outputs) <= 2 else torch.cat(outputs, dim=1)

    def _split(self, qkv: Tensor, rotary: Tensor, index: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        fused = self.self_attn.fused
        return split_qkv(qkv, fused.norm, rotary, index, keys, values, num_heads=fused.num_heads, eps=fused.eps)

    def _head_shape(self) -> tuple[int, int]:
        """N and D."""
        fused = self.self_attn.fused
        return fused.num_heads, fused.norm.shape[1] // fused.num_heads


def writes_directly(qkv: Tensor, cache: object, chunks: Sequence[ChunkSlots], num_heads: int) -> bool:
    """Whether the keys and values in qkv can go straight into the slots of a cache.

    They cannot if the cache joins several, is held in 8 bits or in another dtype, moves its sink along, or belongs to
    some of the heads only.
    """
    return (
        isinstance(cache, LayerCache)
        and cache.k.scale is None
        and cache.k.data.dtype == qkv.dtype
        and cache.k.data.shape[3] == num_heads
        and cache.sink is None
        and all(chunk.index is not None and chunk.sink_shift is None for chunk in chunks)
        and not torch.is_grad_enabled()
    )
