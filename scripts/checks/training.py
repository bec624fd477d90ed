"""One step of Self Forcing with tiny parts: rollout with gradient, distribution matching, critic, optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.denoiser import Denoiser
from model.kv_cache import KVCache
from pipeline.optimize import CompileMode, compile_blocks
from pipeline.rollout import RolloutConfig, rollout
from scripts.checks.parts import LATENT, SIZES, random
from trainer.objectives.dmd import critic_loss, dmd_loss

RULES = RolloutConfig(denoising_steps=[1000.0, 500.0])


def training_losses(
    make: Callable[[torch.device, torch.dtype], Denoiser], device: torch.device, *, compiled: bool
) -> list[float]:
    """Return the losses of generator and critic, before and after one AdamW step of both, in float32."""
    student, teacher, critic = (make(device, torch.float32) for _ in range(3))
    teacher.requires_grad_(False)
    if compiled:
        for denoiser in (student, teacher, critic):
            compile_blocks(denoiser.transformer, CompileMode.default)
    optimizers = [torch.optim.AdamW(denoiser.parameters(), lr=1e-3) for denoiser in (student, critic)]
    with torch.no_grad():  # else real and fake score are equal, and the loss has no gradient
        critic.transformer.head.head.weight.mul_(0.5)
    losses = []
    for _ in range(2):
        video = _video(student, device)
        score = {
            "timesteps": torch.full((1, 1), 600.0, device=device),
            "noise": random(*video.shape, seed=7).to(device),
        }
        embeds, negative = (random(1, SIZES.text_len, SIZES.text_dim, seed=seed).to(device) for seed in (5, 6))
        generator = dmd_loss(video, teacher, critic, embeds, negative, real_guidance_scale=3.0, **score).loss
        generator.backward()
        fake = critic_loss(video, critic, embeds, **score)
        critic.zero_grad()
        fake.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses += [generator.item(), fake.item()]
    return losses


def _video(student: Denoiser, device: torch.device) -> torch.Tensor:
    """Return a rollout [1 F C H W] with gradient."""
    noise = random(1, 6, SIZES.in_dim, *LATENT, seed=3).to(device)
    embeds = random(1, SIZES.text_len, SIZES.text_dim, seed=5).to(device)
    cache = KVCache(SIZES.num_layers, append_only=True)
    generator = torch.Generator().manual_seed(4)
    chunks = rollout(student, noise, embeds, cache, RULES, exit_steps=[1, 1], grad_start_frame=0, generator=generator)
    return torch.cat([chunk.latents for chunk in chunks], dim=1)
