"""Decoding and encoding, alone and beside diffusers' Wan VAE."""

from __future__ import annotations

from functools import partial

import torch

from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE
from scripts.measuring.bench import Bench, Figures
from utils.tracking import peak_memory

PEER_LATENTS = (5, 8, 12)
"""Frames, rows and columns: 17 frames of 64x96 pixels."""


def measure_codec(bench: Bench) -> Figures:
    """Decoding a clip as a stream, chunk by chunk, and encoding it."""
    codec, rules = bench.codec(), bench.config.rollout
    frames = bench.num_frames
    latents = torch.randn((1, *bench.config.video.latent_shape(codec, frames)), device=bench.device, dtype=bench.dtype)

    def decode() -> None:
        decoder = codec.streaming_decoder()
        for chunk in latents.split(rules.frames_per_chunk, dim=1):
            decoder.decode(chunk)

    with torch.inference_mode():
        warm_up = bench.seconds(decode)
        peak_memory(bench.device)
        decoding, encoding = bench.in_turn(decode, partial(codec.encode, codec.decode(latents)))
    pixel_frames = codec.num_frames(frames)
    return {
        "decode s": decoding,
        "decoded frames/s": pixel_frames / decoding,
        "encode s": encoding,
        "peak memory GiB": peak_memory(bench.device),
        "warm-up s": warm_up,
    }


def measure_codec_peer(bench: Bench) -> Figures:
    """Our streaming Wan VAE decode over diffusers' whole decode, same weights and latents, in turn."""
    from diffusers import AutoencoderKLWan

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
