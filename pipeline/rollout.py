"""The autoregressive rollout: the one loop behind generation and self-forcing training (Self Forcing, Algorithms 1, 2).

Shapes: B batch, F latent frames of the clip, f of a chunk, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from model.attention import BlockMask, block_causal_mask, chunk_ranges
from model.denoiser import Denoiser
from model.flow_matching import add_noise
from model.kv_cache import KVCache

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class RolloutConfig:
    """How a clip is rolled out."""

    denoising_steps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    """Timesteps of the few-step denoiser, descending from 1000."""
    warp_denoising_step: bool = True
    """Look the steps up in the shifted 1000-step grid."""
    frames_per_chunk: int = 3
    """Latent frames denoised together; 1 is frame-wise."""
    independent_first_frame: bool = False
    """The first chunk is a single frame (an image)."""
    context_noise: float = 0.0
    """Timestep at which finished frames are committed to the cache; 0 commits them clean."""
    window: int | None = None
    """Most latent frames attention sees, the current chunk included; null sees everything."""
    sink: int = 0
    """First latent frames that never leave the window."""

    def __post_init__(self) -> None:
        steps = self.denoising_steps
        if not steps or any(a <= b for a, b in pairwise(steps)) or steps[0] > 1000 or steps[-1] <= 0:
            raise ValueError(f"denoising_steps={steps} must descend within (0, 1000]")
        if self.frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk={self.frames_per_chunk} must be at least 1")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise={self.context_noise} must be a timestep in [0, 1000]")
        if self.window is not None and self.window - self.sink < self.frames_per_chunk:
            raise ValueError(
                f"window={self.window} less sink={self.sink} does not hold frames_per_chunk={self.frames_per_chunk}"
            )
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must not be negative")

    def chunks(self, num_frames: int, context_frames: int = 0) -> list[tuple[int, int]]:
        """Frame ranges of the generated chunks, after ``context_frames`` given ones; raises where they do not fit."""
        alone = self.independent_first_frame and context_frames == 0
        ranges = chunk_ranges(num_frames, self.frames_per_chunk, alone)
        return [(start + context_frames, end + context_frames) for start, end in ranges]

    def mask(self, num_frames: int, build: Callable[..., BlockMask] = block_causal_mask) -> BlockMask:
        """What training on whole clips sees of them, as the cache would; ``build`` is a mask of model.attention."""
        return build(
            num_frames,
            self.frames_per_chunk,
            window=self.window,
            sink=self.sink,
            independent_first_frame=self.independent_first_frame,
        )

    def timesteps(self, denoiser: Denoiser) -> list[float]:
        """The step list as the denoiser's schedule warps it."""
        return denoiser.schedule.warp(self.denoising_steps) if self.warp_denoising_step else self.denoising_steps


@dataclass
class Block:
    """One finished chunk."""

    start_frame: int
    latents: Tensor
    """Predicted x0 [B f C H W]."""


def randn(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Standard normal [B ...] in the device and dtype of ``like``; with a list, sample b draws from generator b.

    Drawn where the generator lives, in float32: a CPU generator gives the same numbers on every device.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        drawn = torch.cat([torch.randn(1, *shape[1:], generator=one, device=one.device) for one in generator])
    else:
        drawn = torch.randn(*shape, generator=generator, device=generator.device if generator else like.device)
    return drawn.to(like)


def rollout(
    denoiser: Denoiser,
    noise: Tensor | Iterable[Tensor],
    prompt_embeds: Tensor,
    cache: KVCache,
    config: RolloutConfig,
    *,
    context_latents: Tensor | None = None,
    exit_steps: Sequence[int] | None = None,
    grad_start_frame: int | None = None,
    generator: Generators = None,
    denoise_chunk: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[Block]:
    """Generate chunk after chunk, each denoised in a few steps over the cache of the chunks before it.

    Args:
        noise: [B F C H W], split into chunks; or chunks [B f C H W] from an iterable that may never end.
        prompt_embeds: [B L E].
        cache: reset here; with gradients it must be ``append_only``.
        context_latents: given clean frames [B F' C H W] (an image or a video) before the first chunk.
        exit_steps: for training, the index of the step at which each chunk stops; None runs every step.
        grad_start_frame: first frame whose chunk's exit pass carries gradient; None carries none anywhere.
        generator: for the fresh noise between steps; see :func:`randn`.
        denoise_chunk: another way to turn the noise [B f C H W] of a chunk at ``start_frame`` into x0, such as a
            many-step solver over the same cache; None is the few-step denoiser.

    Yields:
        finished chunks, each before its context pass, which runs only when another chunk follows.

    Raises:
        ValueError: frames that do not divide into chunks, or an ``exit_steps`` of the wrong length.
    """
    timesteps = config.timesteps(denoiser)
    start = 0 if context_latents is None else context_latents.shape[1]
    total = None
    if isinstance(noise, Tensor):
        total = start + noise.shape[1]
        chunks = config.chunks(noise.shape[1], start)
        if exit_steps is not None and len(exit_steps) != len(chunks):
            raise ValueError(f"{len(exit_steps)} exit_steps for {len(chunks)} chunks")
        noise = noise.split([chunk_end - chunk_start for chunk_start, chunk_end in chunks], dim=1)
    cache.set_window(config.window, config.sink)
    cache.reset(total)
    if context_latents is not None:
        _commit_context(denoiser, context_latents, prompt_embeds, cache, config)

    previous: Block | None = None
    for index, latents in enumerate(noise):
        if previous is not None:
            _commit(denoiser, previous, prompt_embeds, cache, config.context_noise, generator)
        if denoise_chunk is None:
            steps = timesteps if exit_steps is None else timesteps[: exit_steps[index] + 1]
            with_grad = grad_start_frame is not None and start >= grad_start_frame
            x0 = _denoise(denoiser, latents, prompt_embeds, cache, start, steps, with_grad, generator)
        else:
            x0 = denoise_chunk(latents, start)
        previous = Block(start, x0)
        start += latents.shape[1]
        yield previous


def _denoise(
    denoiser: Denoiser,
    latents: Tensor,
    prompt_embeds: Tensor,
    cache: KVCache,
    start_frame: int,
    timesteps: Sequence[float],
    with_grad: bool,
    generator: Generators,
) -> Tensor:
    """Predict x0 at each timestep and noise it anew to the next; only the last pass may carry gradient."""
    for step, timestep in enumerate(timesteps):
        last = step == len(timesteps) - 1
        with nullcontext() if last and with_grad else torch.no_grad():
            x0 = denoiser(
                latents, full_timesteps(timestep, latents), prompt_embeds, cache=cache, start_frame=start_frame
            ).x0
        if not last:
            latents = add_noise(x0, randn(x0.shape, generator, x0), full_timesteps(timesteps[step + 1], x0))
    return x0


@torch.no_grad()
def _commit(
    denoiser: Denoiser, block: Block, prompt_embeds: Tensor, cache: KVCache, timestep: float, generator: Generators
) -> None:
    """The context pass: overwrite the chunk's keys and values with those of the finished frames."""
    latents = block.latents.detach()
    if timestep > 0:
        latents = add_noise(latents, randn(latents.shape, generator, latents), full_timesteps(timestep, latents))
    denoiser(latents, full_timesteps(timestep, latents), prompt_embeds, cache=cache, start_frame=block.start_frame)


@torch.no_grad()
def _commit_context(
    denoiser: Denoiser, latents: Tensor, prompt_embeds: Tensor, cache: KVCache, config: RolloutConfig
) -> None:
    """Commit given frames clean, in chunks as they would have been generated; the first takes what is left over."""
    alone = 1 if config.independent_first_frame else 0
    first = alone + (latents.shape[1] - alone) % config.frames_per_chunk
    sizes = [first] * (first > 0) + [config.frames_per_chunk] * ((latents.shape[1] - first) // config.frames_per_chunk)
    start = 0
    for part in latents.split(sizes, dim=1):
        denoiser(part, full_timesteps(0.0, part), prompt_embeds, cache=cache, start_frame=start)
        start += part.shape[1]


def full_timesteps(timestep: float, latents: Tensor) -> Tensor:
    """One timestep for every frame of latents [B F ...]: [B F] float32, filled on the device without a copy."""
    return torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=latents.device)
