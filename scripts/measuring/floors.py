"""Compare our passes with bare matrix products. A pass cannot be faster than its products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import KVCache
from model.transformer import WanConfig, WanTransformer
from pipeline.optimize import optimize
from pipeline.steps import most_steps
from scripts.measuring.bench import Bench, Figures

FLOOR_SIZES = {"dim": 384, "ffn_dim": 1536, "num_heads": 6, "num_layers": 6, "text_dim": 64, "text_len": 32}
FLOOR_LATENT = (16, 24)
FLOOR_FRAMES = 21


def measure_floor(bench: Bench) -> Figures:
    """Compare a cached rollout with the bare matrix products and attention of its shapes, pass by pass in turn."""
    sizes = WanConfig(**FLOOR_SIZES)
    transformer = WanTransformer(sizes).to(bench.device, bench.dtype)
    optimize(transformer, bench.config.optimize)
    size, steps = bench.config.rollout.frames_per_chunk, most_steps(bench.config.rollout.denoising_steps)
    latents, embeds = floor_inputs(sizes, size, transformer.head.head.bias)
    forward = partial(transformer, latents, torch.full((1, 1), 500.0, device=bench.device), embeds)
    cache = KVCache(sizes.num_layers)
    cache.reset(FLOOR_FRAMES)
    ours = floor = 0.0
    with torch.inference_mode():
        for start in range(0, FLOOR_FRAMES, size):
            options = {"cache": cache, "start_frame": start}
            commits = start + size < FLOOR_FRAMES
            denoised, committed, products = bench.in_turn(
                partial(forward, **options),
                partial(forward, **options, output_frames=0),
                bare_pass(sizes, size, start + size, latents),
            )
            ours += steps * denoised + commits * committed
            floor += (steps + commits) * products
    return {"rollout s": ours, "bare products s": floor, "rollout / bare products": ours / floor}


def floor_inputs(sizes: WanConfig, frames: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents [1 F C H W] and prompt embeddings [1 L E] of the sizes that are compared."""
    return (
        torch.randn(1, frames, sizes.in_dim, *FLOOR_LATENT).to(like),
        torch.randn(1, sizes.text_len, sizes.text_dim).to(like),
    )


def bare_pass(sizes: WanConfig, frames: int, seen_frames: int, like: Tensor) -> Callable[[], None]:
    """Return a function that computes only the matrix products and the attention of one pass over a chunk."""
    height, width = (side // patch for side, patch in zip(FLOOR_LATENT, sizes.patch_size[1:], strict=True))
    tokens, dim, heads = height * width, sizes.dim, sizes.num_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(like)

    x, hidden = random(frames * tokens, dim), random(frames * tokens, sizes.ffn_dim)
    qkv, square, wide, narrow = (
        random(3 * dim, dim),
        random(dim, dim),
        random(sizes.ffn_dim, dim),
        random(dim, sizes.ffn_dim),
    )
    q, k, v, text = (
        random(1, heads, length, dim // heads)
        for length in (frames * tokens, seen_frames * tokens, seen_frames * tokens, sizes.text_len)
    )

    def products() -> None:
        for _ in range(sizes.num_layers):
            F.linear(x, qkv, qkv[:, 0])
            F.scaled_dot_product_attention(q, k, v)
            for _ in range(3):  # output of self-attention, query and output of cross-attention
                F.linear(x, square, square[0])
            F.scaled_dot_product_attention(q, text, text)
            F.linear(x, wide, wide[:, 0])
            F.linear(hidden, narrow, narrow[:, 0])

    return products
