"""Measure the stages of making videos, and endless streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from pipeline.rollout import FinishedChunk, Stage, rollout, rollout_passes
from pipeline.steps import steps_of_chunk
from scripts.measuring.bench import Bench, Figures
from utils.frames import to_uint8
from utils.tracking import peak_memory

EARLY_CHUNK, LATE_CHUNK = 20, 500
LONG_CHUNK = 6
"""The chunk whose denoising time other publications report."""


def measure_inference(bench: Bench) -> Figures:
    """Measure the stages of making videos, one after the other. The first frame and the rate include all of them."""
    denoiser, codec = bench.denoiser(), bench.codec()
    embed = bench.text(denoiser.transformer.config)
    frames = bench.num_frames
    shape = (1, *bench.config.video.latent_shape(codec, frames))
    with torch.inference_mode():
        warm_up = bench.seconds(lambda: [time_videos(bench, denoiser, codec, embed, shape) for _ in range(2)])
        bench.spans.clear()
        peak_memory(bench.device)
        videos = [time_videos(bench, denoiser, codec, embed, shape) for _ in range(bench.repeats)]
    best = min(videos, key=lambda video: video["total"])
    figures = bench.stages() | {f"{name} s": best[name] for name in ("first frame", "denoise and context", "total")}
    pixel_frames = codec.num_frames(frames)
    return figures | {
        "frames/s": pixel_frames / best["total"],
        "frames/s without decode": pixel_frames / best["denoise and context"],
        "peak memory GiB": peak_memory(bench.device),
        "warm-up s": warm_up,
    }


def time_videos(bench: Bench, denoiser: Denoiser, codec: VideoCodec, embed: Callable[[], Tensor], shape) -> Figures:
    """Make one video and time its stages. Return the seconds of the first frame, of the denoiser, and in total."""
    begin, first, denoised, before = bench.now(), None, 0.0, 0.0
    with bench.stage("text"):
        embeds = embed()
    noise = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    timesteps, decoder = bench.config.rollout.timesteps(denoiser), codec.streaming_decoder()
    cache = KVCache(denoiser.transformer.config.num_layers)
    passes = rollout_passes(timesteps, noise, embeds, cache, bench.config.rollout)
    event, chunk = next(passes), 0
    while event is not None:
        if isinstance(event, FinishedChunk):
            chunk += 1
            if chunk == LONG_CHUNK:
                bench.spans.setdefault(f"steps of chunk {chunk}", []).append(denoised - before)
            if chunk == 1:  # as Stream.decode_parts does
                for latent in event.latents.split(1, dim=1):
                    with bench.stage("decode of a first latent"):
                        to_uint8(decoder.decode(latent)[0]).cpu()
                    first = first or bench.now() - begin
            else:
                with bench.stage("decode"):
                    pixels = decoder.decode(event.latents)
                with bench.stage("host copy"):
                    to_uint8(pixels[0]).cpu()
            event = next(passes, None)
            continue
        step = (
            f"step {steps_of_chunk(timesteps, chunk).index(event.timestep) + 1}"
            if event.stage is Stage.denoise
            else "context"
        )
        with bench.stage(step):
            x0 = event.run(denoiser)
        denoised += bench.spans[step][-1]
        before = denoised if event.stage is Stage.context else before
        event = passes.send(x0)
    return {"first frame": first, "denoise and context": denoised, "total": bench.now() - begin}


def measure_endless(bench: Bench) -> Figures:
    """Compare late chunks of a stream with early ones. The window is full in both. Two streams take turns."""
    denoiser, codec = bench.denoiser(), bench.codec()
    rules = bench.config.rollout if bench.config.rollout.window else replace(bench.config.rollout, window=9)
    shape = (1, *bench.config.video.latent_shape(codec, rules.frames_per_chunk))
    noise = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    embeds = bench.text(denoiser.transformer.config)()
    with torch.inference_mode():
        young, old = (
            rollout(denoiser, repeat(noise), embeds, KVCache(denoiser.transformer.config.num_layers), rules)
            for _ in range(2)
        )
        for stream, chunks in ((young, EARLY_CHUNK), (old, LATE_CHUNK)):
            for _ in range(chunks - bench.repeats // 2):
                next(stream)
        early, late = bench.in_turn(partial(next, young), partial(next, old))
    return {f"chunk {EARLY_CHUNK} ms": 1e3 * early, f"chunk {LATE_CHUNK} ms": 1e3 * late, "late / early": late / early}
