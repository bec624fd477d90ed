"""Measure decoding and encoding with the codec of a configuration."""

from __future__ import annotations

from functools import partial

import torch

from scripts.measuring.bench import Bench, Figures
from utils.tracking import peak_memory


def measure_codec(bench: Bench) -> Figures:
    """Measure how long it takes to decode a clip as a stream, chunk by chunk, and to encode it."""
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
