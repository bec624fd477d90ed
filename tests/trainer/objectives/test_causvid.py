"""CausVid: independent timesteps of chunks, one causal step from real latents, and the gradient of DMD through it."""

import torch

from model.attention import block_causal_mask, teacher_forcing_mask
from model.flow_matching import add_noise
from tests.parity import gradients, random, relative_error, tiny_denoiser
from trainer.objectives.causvid import denoise_chunks, sample_step_timesteps
from trainer.objectives.dmd import dmd_loss

STEPS, CHUNKS = [1000.0, 937.5, 833.25, 625.0], [(0, 1), (1, 3), (3, 5)]
CLEAN, NOISE, EMBEDS = random(2, 4, 4, 4, 4), random(2, 4, 4, 4, 4, seed=1), random(2, 5, 8)
TIMESTEPS = torch.tensor([[1000.0, 1000.0, 625.0, 625.0], [833.25, 833.25, 937.5, 937.5]])
MASK = block_causal_mask(4, 2)


def test_timesteps_are_steps_shared_by_a_chunk_and_independent_between_chunks():
    drawn = sample_step_timesteps(500, CHUNKS, STEPS, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 5) and set(drawn.unique().tolist()) == set(STEPS)
    assert torch.equal(drawn[:, 1], drawn[:, 2]) and torch.equal(drawn[:, 3], drawn[:, 4])
    pairs = {tuple(pair) for pair in drawn[:, [1, 3]].tolist()}
    assert len(pairs) == 16
    assert torch.equal(drawn, sample_step_timesteps(500, CHUNKS, STEPS, torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_x0_is_one_causal_step_from_the_noised_latents():
    denoiser, drawn = tiny_denoiser(), {"timesteps": TIMESTEPS, "block_mask": MASK}
    x0 = denoise_chunks(denoiser, CLEAN, EMBEDS, noise=NOISE, **drawn)
    sigma = TIMESTEPS[..., None, None, None] / 1000
    noisy = (1 - sigma) * CLEAN + sigma * NOISE
    flow = denoiser.transformer(noisy, TIMESTEPS, EMBEDS, block_mask=MASK)
    assert relative_error(x0, noisy - sigma * flow) < 1e-5

    later = CLEAN.clone()
    later[:, 2:] += 1
    changed = denoise_chunks(denoiser, later, EMBEDS, noise=NOISE, **drawn)
    assert torch.equal(changed[:, :2], x0[:, :2]) and not torch.equal(changed[:, 2:], x0[:, 2:])


def test_pure_noise_hides_the_real_latents():
    drawn = {"timesteps": torch.full((2, 4), 1000.0), "noise": NOISE, "block_mask": MASK}
    with torch.no_grad():
        one, other = (denoise_chunks(tiny_denoiser(), clean, EMBEDS, **drawn) for clean in (CLEAN, CLEAN + 1))
    assert torch.equal(one, other)


@torch.no_grad()
def test_clean_context_shows_a_chunk_the_real_chunks_before_it_without_noise():
    """At pure noise a chunk depends only on the real chunks before it, not on later ones or on its own real chunk."""
    drawn = {"timesteps": torch.full((2, 4), 1000.0), "noise": NOISE, "block_mask": teacher_forcing_mask(4, 2)}
    first, second = CLEAN.clone(), CLEAN.clone()
    first[:, :2] += 1
    second[:, 2:] += 1
    x0, before, after = (
        denoise_chunks(tiny_denoiser(), clean, EMBEDS, clean_context=True, **drawn) for clean in (CLEAN, first, second)
    )
    assert torch.equal(before[:, :2], x0[:, :2]) and not torch.equal(before[:, 2:], x0[:, 2:])
    assert torch.equal(after, x0)


def test_dmd_gradient_reaches_the_generator_only_and_is_the_hand_written_one():
    generator, real, fake = (tiny_denoiser(seed=seed) for seed in range(3))
    x0 = denoise_chunks(generator, CLEAN, EMBEDS, timesteps=TIMESTEPS, noise=NOISE, block_mask=MASK)
    score_noise, negative = random(*CLEAN.shape, seed=4), random(2, 5, 8, seed=5)
    level = torch.tensor([[400.0], [900.0]])
    loss, _ = dmd_loss(x0, real, fake, EMBEDS, negative, timesteps=level, noise=score_noise, real_guidance_scale=1.5)
    loss.backward()
    taken = gradients(generator)
    assert gradients(real) == {} and gradients(fake) == {}

    x0 = denoise_chunks(generator, CLEAN, EMBEDS, timesteps=TIMESTEPS, noise=NOISE, block_mask=MASK)
    with torch.no_grad():
        noisy, level = add_noise(x0, score_noise, level.expand(2, 4)), level.expand(2, 4)
        c, u = (real(noisy, level, embeds).x0 for embeds in (EMBEDS, negative))
        guided = c + 1.5 * (c - u)
        scale = (x0 - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        direction = (fake(noisy, level, EMBEDS).x0 - guided) / scale / x0.numel()
    (x0 * direction).sum().backward()
    expected = gradients(generator)
    assert taken.keys() == expected.keys() and len(taken) > 50
    assert max(relative_error(taken[name], expected[name]) for name in taken) < 1e-3
