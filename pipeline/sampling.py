"""Many-step sampling with classifier-free guidance: bidirectional (the teacher) and causal, and trajectories.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text, S solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.flow_matching import MAX_TIMESTEP, FlowMatching, full_timesteps
from model.kv_cache import KVCache
from pipeline.rollout import FinishedChunk, RolloutConfig, rollout

FlowFunction = Callable[[Tensor, float], Tensor]

UNIPC_FIRST_LEVEL = 0.999


class Solver(Enum):
    """The integrator of the probability-flow ODE."""

    euler = "euler"
    """The Euler method, order 1."""
    unipc = "unipc"
    """UniPC (arXiv 2302.04867), order 2. Wan uses it."""
    dpm = "dpm++"
    """DPM-Solver++ (arXiv 2211.01095), order 2, multistep."""


@dataclass
class SamplingConfig:
    """How a many-step denoiser is sampled."""

    steps: int = 50
    """Solver steps."""
    solver: Solver = Solver.unipc
    """euler, unipc or dpm++."""
    guidance_scale: float = 6.0
    """Classifier-free guidance ``u + g (c - u)``. 1 is no guidance."""
    negative_prompt: str = ""
    """Prompt of the unconditional half."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def timesteps(self, schedule: FlowMatching) -> Tensor:
        """Return the timesteps [S] of the solver's steps, without the final 0.

        The log-SNR of pure noise is infinite, so UniPC starts just below pure noise, like Wan's own sampler.
        """
        if self.solver is not Solver.unipc:
            return schedule.grid(self.steps)
        levels = 1 - torch.arange(self.steps, dtype=torch.float64) / self.steps
        return schedule.timestep(UNIPC_FIRST_LEVEL * levels)


def integrate(flow: FlowFunction, noise: Tensor, timesteps: Tensor, solver: Solver) -> Iterator[Tensor]:
    """Yield the states of the ODE ``dx = v dsigma`` from noise to data, one after each step.

    Args:
        flow: ``(latents, timestep) -> v``.
        noise: [B C ...], the state at ``timesteps[0]``. ``flow`` gets latents of its dtype. The sum over the steps is
            in float32 or better, because half precision would lose many small steps.
        timesteps: [S] descending in (0, 1000]. The final 0 is added here.
    """
    solve = {Solver.euler: _euler, Solver.unipc: _unipc, Solver.dpm: _dpm}[solver]
    precise = torch.promote_types(noise.dtype, torch.float32)

    def precise_flow(latents: Tensor, timestep: float) -> Tensor:
        return flow(latents.to(noise.dtype), timestep).to(precise)

    for latents in solve(precise_flow, noise.to(precise), timesteps):
        yield latents.to(noise.dtype)


def _euler(flow: FlowFunction, latents: Tensor, timesteps: Tensor) -> Iterator[Tensor]:
    for timestep, following in zip(timesteps.tolist(), [*timesteps[1:].tolist(), 0.0], strict=True):
        latents = latents + (following - timestep) / MAX_TIMESTEP * flow(latents, timestep)
        yield latents


def _dpm(flow: FlowFunction, latents: Tensor, timesteps: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++ (2M) of order 2. Its first and its last step have order 1.

    With ``lambda = log((1 - sigma) / sigma)``, ``h`` its step and D the predicted x0, extrapolated from the last two:
    ``x' = (sigma' / sigma) x + (1 - sigma') (1 - exp(-h)) D``.
    """
    sigmas = [*(timesteps.double() / MAX_TIMESTEP).tolist(), 0.0]
    levels = [_log_snr(sigma) for sigma in sigmas]
    before = None
    for step, (timestep, sigma, following) in enumerate(zip(timesteps.tolist(), sigmas, sigmas[1:], strict=False)):
        x0 = latents - sigma * flow(latents, timestep)
        h = levels[step + 1] - levels[step]
        target = x0
        if before is not None and following > 0:
            target = x0 + 0.5 * h / (levels[step] - levels[step - 1]) * (x0 - before)
        latents = following / sigma * latents + (1 - following) * -math.expm1(-h) * target
        before = x0
        yield latents


def _log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


def _unipc(flow: FlowFunction, noise: Tensor, timesteps: Tensor) -> Iterator[Tensor]:
    """UniPC (arXiv 2302.04867) of order 2. As in Wan's sampler, the network gets timesteps rounded down to integers."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=(timesteps / MAX_TIMESTEP).numpy())
    scheduler.set_begin_index(0)  # count steps; a lookup would confuse timesteps that round to the same value
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(flow(latents, float(timestep)), timestep, latents, return_dict=False)[0]
        yield latents


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    config: SamplingConfig,
) -> Tensor:
    """Sample whole clips bidirectionally: noise [B F C H W], embeds [B L E] -> latents [B F C H W]."""
    *_, latents = trajectory(denoiser, noise, prompt_embeds, negative_embeds, config)
    return latents


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    config: SamplingConfig,
) -> list[Tensor]:
    """Return all S + 1 states of a bidirectional sampling, each [B F C H W], beginning with the noise."""

    def flow(latents: Tensor, timestep: float) -> Tensor:
        doubled, embeds = _double(latents, prompt_embeds, negative_embeds, config)
        return _guide(denoiser(doubled, full_timesteps(timestep, doubled), embeds).flow, config)

    return [noise, *integrate(flow, noise, config.timesteps(denoiser.schedule), config.solver)]


def sample_causal(
    denoiser: Denoiser,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    rollout_config: RolloutConfig,
    config: SamplingConfig,
    *,
    context_latents: Tensor | None = None,
) -> Iterator[FinishedChunk]:
    """Sample a many-step causal denoiser autoregressively over a cache. Yields finished chunks.

    With guidance the batch is doubled, so the conditional and the unconditional context share one cache.
    """
    batch = noise.shape[0]
    doubled_noise, embeds = _double(noise, prompt_embeds, negative_embeds, config)
    cache = KVCache(denoiser.transformer.config.num_layers)

    @torch.no_grad()
    def denoise_chunk(latents: Tensor, start_frame: int) -> Tensor:
        def flow(half: Tensor, timestep: float) -> Tensor:
            state = half.repeat(latents.shape[0] // batch, 1, 1, 1, 1)
            prediction = denoiser(state, full_timesteps(timestep, state), embeds, cache=cache, start_frame=start_frame)
            return _guide(prediction.flow, config)

        *_, x0 = integrate(flow, latents[:batch], config.timesteps(denoiser.schedule), config.solver)
        return x0.repeat(latents.shape[0] // batch, 1, 1, 1, 1)

    if context_latents is not None:
        context_latents = context_latents.repeat(doubled_noise.shape[0] // batch, 1, 1, 1, 1)
    for chunk in rollout(
        denoiser,
        doubled_noise,
        embeds,
        cache,
        rollout_config,
        context_latents=context_latents,
        denoise_chunk=denoise_chunk,
    ):
        yield FinishedChunk(chunk.start_frame, chunk.latents[:batch])


def many_step_chunks(
    denoiser: Denoiser,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    rollout_config: RolloutConfig,
    config: SamplingConfig,
    *,
    causal: bool,
    context_latents: Tensor | None = None,
) -> Iterator[FinishedChunk]:
    """Yield finished chunks of a many-step sampler: autoregressive if ``causal``, else whole clips cut into chunks.

    Args:
        noise: the noise of the whole clip [B F C H W].
        context_latents: given latents [B f C H W] before it. A bidirectional sampler does not accept them.
    """
    if causal:
        options = {"context_latents": context_latents}
        yield from sample_causal(denoiser, noise, prompt_embeds, negative_embeds, rollout_config, config, **options)
        return
    start = 0
    clip = sample(denoiser, noise, prompt_embeds, negative_embeds, config)
    for latents in clip.split(rollout_config.frames_per_chunk, dim=1):
        yield FinishedChunk(start, latents)
        start += latents.shape[1]


def _double(
    latents: Tensor, prompt_embeds: Tensor, negative_embeds: Tensor, config: SamplingConfig
) -> tuple[Tensor, Tensor]:
    if config.guidance_scale == 1:
        return latents, prompt_embeds
    return latents.repeat(2, 1, 1, 1, 1), torch.cat([prompt_embeds, negative_embeds])


def _guide(flow: Tensor, config: SamplingConfig) -> Tensor:
    if config.guidance_scale == 1:
        return flow
    conditional, unconditional = flow.chunk(2)
    return torch.lerp(unconditional, conditional, config.guidance_scale)
