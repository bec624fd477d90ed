"""Tiny parts of a pipeline with random weights, which are the same on every device.

Shapes: B batch, F latent frames, C channels, H W latent size, L text tokens, E text channels.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.kv_cache import KVCache
from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig
from model.transformer import WanConfig, WanTransformer
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE
from pipeline.optimize import OptimizeConfig, optimize
from pipeline.rollout import RolloutConfig, rollout
from pipeline.text_to_video import TextToVideo

SIZES = WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=16, text_len=16, freq_dim=32)
RULES = RolloutConfig(denoising_steps=[1000.0, 500.0], window=6)
LATENT = (4, 6)
"""Rows and columns of a latent: 32x48 pixels."""
FRAMES = 9


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers [shape] on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def _denoiser() -> Denoiser:
    transformer = WanTransformer(SIZES)
    transformer.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():  # a head of zeros would hide all differences before it
        transformer.head.head.weight.copy_(0.05 * random(*transformer.head.head.weight.shape, seed=1))
    return Denoiser(transformer, FlowMatching(5.0))


def tiny_denoiser(device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Return a denoiser to train. Its weights are the same each time."""
    return copy.deepcopy(_denoiser()).to(device, dtype)


def prepared_denoiser(device: torch.device, dtype: torch.dtype, **options) -> Denoiser:
    """Return a denoiser for inference. The options are those of :class:`OptimizeConfig`."""
    denoiser = tiny_denoiser(device, dtype).eval()
    optimize(denoiser.transformer, OptimizeConfig(**options))
    return denoiser


def tiny_codec(kind: str, device: torch.device, dtype: torch.dtype) -> VideoCodec:
    """Return a Wan VAE ("wan") or a TinyVAE ("tiny") with few channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind == "wan":
            codec = WanVAE(WanAutoencoder(WanVAEConfig(base_dim=8)))
        else:
            codec = TinyVAE(TinyVAEConfig(encoder_widths=(8, 8, 8, 8), decoder_widths=(16, 12, 8, 8)))
    return codec.to(device, dtype).eval().requires_grad_(False)


class FixedPrompts:
    """Replaces a text encoder. The embeddings of a prompt depend only on its length."""

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the embeddings [B L E] of B prompts."""
        embeds = [random(SIZES.text_len, SIZES.text_dim, seed=len(prompt)) for prompt in prompts]
        return torch.stack(embeds).to(self.like)


def tiny_pipeline(denoiser: Denoiser, kind: str) -> TextToVideo:
    """Return a pipeline of tiny parts with the given denoiser."""
    like = denoiser.transformer.patch_embedding.weight
    return TextToVideo(denoiser, FixedPrompts(like), tiny_codec(kind, like.device, like.dtype), RULES)


@torch.no_grad()
def rolled_out(denoiser: Denoiser, frames: int = FRAMES, **changes) -> Tensor:
    """Return the latents [1 F C H W] of a clip, float32 on the CPU. `changes` are keys of :class:`RolloutConfig`."""
    like = denoiser.transformer.patch_embedding.weight
    noise = random(1, frames, SIZES.in_dim, *LATENT, seed=3).to(like)
    embeds, cache = FixedPrompts(like).encode(["a prompt"]), KVCache(SIZES.num_layers)
    generator = torch.Generator().manual_seed(4)
    chunks = rollout(denoiser, noise, embeds, cache, replace(RULES, **changes), generator=generator)
    return torch.cat([chunk.latents for chunk in chunks], dim=1).float().cpu()


@lru_cache(maxsize=4)
def reference(frames: int = FRAMES) -> Tensor:
    """Return the clip that the CPU makes in float32 without any option."""
    return rolled_out(prepared_denoiser(torch.device("cpu"), torch.float32, fuse_qkv=False), frames)


def difference(mine: Tensor, other: Tensor) -> float:
    """Return the relative difference of two tensors, ``|mine - other| / |other|``."""
    return ((mine.double() - other.double()).norm() / other.double().norm()).item()
