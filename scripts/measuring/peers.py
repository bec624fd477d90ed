"""Compare our transformer and our Wan VAE with those of diffusers: same weights and shapes, in turn."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from model.transformer import WanConfig, WanTransformer
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE
from model.weights import wan_to_diffusers
from pipeline.optimize import optimize
from scripts.measuring import floors
from scripts.measuring.bench import Bench, Figures

PEER_LATENTS = (5, 8, 12)
"""Frames, rows and columns: 17 frames of 64x96 pixels."""


def measure_peer(bench: Bench) -> Figures:
    """Compare our bidirectional forward pass with that of diffusers: same weights and shapes, in turn."""
    sizes = WanConfig(**floors.FLOOR_SIZES)
    ours = WanTransformer(sizes)
    ours.reset_parameters(torch.Generator().manual_seed(0))
    theirs = WanTransformer3DModel(
        patch_size=tuple(sizes.patch_size),
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.dim // sizes.num_heads,
        in_channels=sizes.in_dim,
        out_channels=sizes.out_dim,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=sizes.eps,
    )
    theirs.load_state_dict(wan_to_diffusers(ours.state_dict()))
    ours, theirs = (model.to(bench.device, bench.dtype).eval() for model in (ours, theirs))
    optimize(ours, bench.config.optimize)
    latents, embeds = floors.floor_inputs(sizes, floors.FLOOR_FRAMES, ours.head.head.bias)
    clip, timestep = latents.transpose(1, 2).contiguous(), torch.full((1,), 500.0, device=bench.device)
    with torch.inference_mode():
        mine, others = bench.in_turn(
            partial(ours, latents, timestep[:, None], embeds),
            partial(theirs, clip, timestep, embeds, return_dict=False),
        )
    return {"ours s": mine, "diffusers s": others, "ours / diffusers": mine / others}


def measure_codec_peer(bench: Bench) -> Figures:
    """Compare our streaming decode of the Wan VAE with diffusers' decode of whole clips: same weights and latents."""
    theirs = AutoencoderKLWan().eval()
    network = WanAutoencoder(WanVAEConfig())
    network.load_state_dict(theirs.state_dict())
    theirs, ours = (model.to(bench.device, bench.dtype) for model in (theirs, WanVAE(network)))
    frames, rows, columns = PEER_LATENTS
    latents = torch.randn(1, frames, ours.latent_channels, rows, columns, device=bench.device, dtype=bench.dtype)
    mean, std = (torch.tensor(theirs.config[key]).view(-1, 1, 1).to(latents) for key in ("latents_mean", "latents_std"))
    raw = (latents * std + mean).transpose(1, 2)

    def stream() -> None:
        decoder = ours.streaming_decoder()
        for chunk in latents.split([1, *[2] * ((frames - 1) // 2)], dim=1):
            decoder.decode(chunk)

    with torch.inference_mode():
        mine, others = bench.in_turn(stream, partial(theirs.decode, raw, return_dict=False))
    return {"ours s": mine, "diffusers s": others, "ours / diffusers": mine / others}
