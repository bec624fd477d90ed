"""Several processes denoise one stream, each with part of every frame's tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside self-attention, a process computes its part of the tokens, with all heads. Inside self-attention it computes
all tokens, but only its part of the heads. So there are two exchanges in each layer, and the cache holds only the
process's heads. Hooks do the exchanges. Every process must get the same inputs, and each gets the whole output.

Shapes: P processes, B batch, F frames, T tokens a frame, N heads, D head dim, C model dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.transformer import WanTransformer


def shard_sequence(transformer: WanTransformer) -> None:
    """Divide the work of a transformer's passes among all processes, in place. For inference.

    Raises:
        ValueError: the number of heads is not a multiple of the number of processes.
    """
    processes, heads = dist.get_world_size(), transformer.config.num_heads
    if heads % processes:
        raise ValueError(f"num_heads={heads} is not a multiple of the {processes} processes")
    transformer.cache_heads(heads // processes)
    transformer.blocks.register_forward_pre_hook(_take_tokens)
    transformer.blocks.register_forward_hook(_gather_tokens)
    for block in transformer.blocks:
        block.self_attn.core.register_forward_pre_hook(_to_heads)
        block.self_attn.core.register_forward_hook(_to_tokens)


def _take_tokens(blocks: nn.Module, args: tuple) -> tuple:
    """Keep this process's tokens of hidden states [B F T C] and of the rotary table [... F T 1 D/2 2]."""
    x, modulation, texts, rotary = args
    processes, rank = dist.get_world_size(), dist.get_rank()
    if x.shape[2] % processes:
        raise ValueError(f"{x.shape[2]} tokens a frame are not a multiple of the {processes} processes")
    return x.chunk(processes, dim=2)[rank], modulation, texts, rotary.chunk(processes, dim=-4)[rank]


def _gather_tokens(blocks: nn.Module, args: tuple, outputs: list[Tensor]) -> list[Tensor]:
    """Join the hidden states [B F T/P C] of all processes to [B F T C]."""
    return [_gather(x) if x.shape[1] else x for x in outputs]


def _gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=2)


def _to_heads(core: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Exchange q, k, v [B F T/P N D] to [B F T N/P D], all three at once."""
    parts = torch.stack(args).unflatten(4, (dist.get_world_size(), -1)).movedim(4, 0)
    return _exchange(parts).movedim(0, 3).flatten(3, 4).unbind(0)


def _to_tokens(core: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """Exchange [B f T N/P D] to [B f T/P N D]."""
    parts = out.unflatten(2, (dist.get_world_size(), -1)).movedim(2, 0)
    return _exchange(parts).movedim(0, 3).flatten(3, 4) if out.shape[1] else out


def _exchange(parts: Tensor) -> Tensor:
    """Send row p of [P ...] to process p. Row p of the result comes from process p."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received
