"""Causal distillation with real context: the formula of the target, causality, and agreement with real rollouts."""

import pytest
import torch

from model.attention import teacher_forcing_mask
from model.flow_matching import add_noise
from model.kv_cache import KVCache
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig, Solver, sample_causal
from tests.parity import gradients, random, relative_error, tiny_denoiser
from trainer.objectives.consistency import (
    causal_trajectory,
    consistency_target,
    in_context_loss,
    predict_in_context,
    sample_step_pairs,
)
from trainer.objectives.ode import pick_states

CLEAN, NOISE = random(2, 4, 4, 4, 4), random(2, 4, 4, 4, 4, seed=1)
EMBEDS, NEGATIVE = random(2, 5, 8), random(2, 5, 8, seed=5)
TIMESTEPS = torch.tensor([[900.0, 900.0, 500.0, 500.0], [300.0, 300.0, 96.0, 96.0]])
FOLLOWING = torch.tensor([[880.0, 880.0, 450.0, 450.0], [200.0, 200.0, 0.0, 0.0]])
NOISY = add_noise(CLEAN, NOISE, TIMESTEPS)
MASK = teacher_forcing_mask(4, 2)


def target_of(average, teacher, guidance: float = 3.0) -> torch.Tensor:
    pair = {"timesteps": TIMESTEPS, "following": FOLLOWING}
    return consistency_target(
        average, teacher, NOISY, CLEAN, EMBEDS, NEGATIVE, **pair, guidance_scale=guidance, block_mask=MASK
    )


@torch.no_grad()
def test_prediction_in_context_is_that_of_each_chunk_over_the_cached_clean_ones():
    denoiser = tiny_denoiser()
    prediction = predict_in_context(denoiser, NOISY, TIMESTEPS, CLEAN, EMBEDS, MASK)
    cache = KVCache(2)
    for start in (0, 2):
        chunk = slice(start, start + 2)
        cached = denoiser(NOISY[:, chunk], TIMESTEPS[:, chunk], EMBEDS, cache=cache, start_frame=start)
        assert relative_error(prediction.x0[:, chunk], cached.x0) < 1e-4
        denoiser(CLEAN[:, chunk], torch.zeros(2, 2), EMBEDS, cache=cache, start_frame=start)


def test_pairs_are_neighbours_of_the_grid_shared_by_a_chunk():
    grid = torch.tensor([1000.0, 700.0, 300.0, 0.0])
    drawn, following = sample_step_pairs(300, [(0, 1), (1, 3)], grid, torch.Generator().manual_seed(0))
    assert drawn.shape == following.shape == (300, 3)
    assert torch.equal(drawn[:, 1], drawn[:, 2]) and torch.equal(following[:, 1], following[:, 2])
    pairs = set(zip(drawn.flatten().tolist(), following.flatten().tolist(), strict=True))
    assert pairs == {(1000.0, 700.0), (700.0, 300.0), (300.0, 0.0)}
    assert len({tuple(row) for row in drawn[:, :2].tolist()}) == 9


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_target_is_the_average_one_guided_euler_step_on(guidance):
    average, teacher = tiny_denoiser(seed=1), tiny_denoiser(seed=2)
    c, u = (predict_in_context(teacher, NOISY, TIMESTEPS, CLEAN, e, MASK).flow for e in (EMBEDS, NEGATIVE))
    closer = NOISY - ((TIMESTEPS - FOLLOWING) / 1000)[..., None, None, None] * (u + guidance * (c - u))
    latents, told = torch.cat([CLEAN, closer], 1), torch.cat([torch.zeros(2, 4), FOLLOWING], 1)
    flow = average.transformer(latents, told, EMBEDS, block_mask=MASK)[:, 4:]
    expected = closer - (FOLLOWING / 1000)[..., None, None, None] * flow
    target = target_of(average, teacher, guidance)
    assert relative_error(target, expected) < 1e-5
    assert torch.allclose(target[1, 2:], closer[1, 2:], atol=1e-6)


@torch.no_grad()
def test_at_zero_the_target_is_the_teachers_end_even_for_networks_that_predict_x0():
    average, teacher = tiny_denoiser(seed=1), tiny_denoiser(seed=2)
    expected = target_of(average, teacher)[1, 2:]
    average.transformer.config = type(average.transformer.config)(
        **{**vars(average.transformer.config), "prediction_type": "x0"}
    )
    assert torch.equal(target_of(average, teacher)[1, 2:], expected)


def test_gradient_reaches_the_student_only_and_is_that_of_the_mse():
    student, average, teacher = (tiny_denoiser(seed=seed) for seed in range(3))
    target = target_of(average, teacher)
    assert not target.requires_grad
    loss = in_context_loss(student, NOISY, TIMESTEPS, target, CLEAN, EMBEDS, MASK)
    loss.backward()
    taken = gradients(student)
    assert gradients(average) == {} and gradients(teacher) == {}

    x0 = predict_in_context(student, NOISY, TIMESTEPS, CLEAN, EMBEDS, MASK).x0
    assert loss.item() == pytest.approx((x0 - target).square().mean().item(), rel=1e-5)
    (x0 * 2 * (x0 - target).detach() / x0.numel()).sum().backward()
    expected = gradients(student)
    assert taken.keys() == expected.keys()
    assert max(relative_error(taken[name], expected[name]) for name in taken) < 1e-3


def test_clean_frames_count_for_nothing():
    student, timesteps, target = tiny_denoiser(), TIMESTEPS.clone(), random(2, 4, 4, 4, 4, seed=8)
    timesteps[:, :2] = 0
    with torch.no_grad():
        loss = in_context_loss(student, NOISY, timesteps, target, CLEAN, EMBEDS, MASK)
        x0 = predict_in_context(student, NOISY, timesteps, CLEAN, EMBEDS, MASK).x0
    assert loss.item() == pytest.approx((x0 - target)[:, 2:].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_trajectory_ends_where_causal_sampling_after_the_clean_chunks_does(guidance):
    teacher = tiny_denoiser()
    config = SamplingConfig(steps=3, solver=Solver.euler, guidance_scale=guidance)
    states = causal_trajectory(teacher, NOISE, CLEAN, EMBEDS, NEGATIVE, config, MASK)
    assert len(states) == 4 and torch.equal(states[0], NOISE) and not states[-1].requires_grad
    for start, context in ((0, None), (2, CLEAN[:, :2])):
        (block,) = sample_causal(
            teacher,
            NOISE[:, start : start + 2],
            EMBEDS,
            NEGATIVE,
            RolloutConfig(frames_per_chunk=2),
            config,
            context_latents=context,
        )
        assert relative_error(states[-1][:, start : start + 2], block.latents) < 1e-4


def test_a_teachers_own_trajectory_is_consistent_where_its_flow_is_straight():
    """If the teacher's flow is constant (only a bias), x0 = x - sigma v everywhere, and there is nothing to learn."""
    teacher = tiny_denoiser()
    with torch.no_grad():
        teacher.transformer.head.head.weight.zero_()
    assert in_context_loss(teacher, NOISY, TIMESTEPS, target_of(teacher, teacher), CLEAN, EMBEDS, MASK) < 1e-10
    config = SamplingConfig(steps=4, solver=Solver.euler, guidance_scale=1.0)
    states = causal_trajectory(teacher, NOISE, CLEAN, EMBEDS, NEGATIVE, config, MASK)
    grid = config.timesteps(teacher.schedule).tolist()
    noisy, timesteps = pick_states(torch.stack(states[:-1], 1), grid, [(0, 4)], torch.Generator().manual_seed(1))
    assert all(len(set(row)) == 1 for row in timesteps.tolist())
    assert in_context_loss(teacher, noisy, timesteps, states[-1], CLEAN, EMBEDS, MASK) < 1e-10


def test_students_learn_the_flow_map_by_either_route():
    """30 steps bring the one-step prediction nearer to the teacher's endpoint, also for new noise."""
    teacher, grid = tiny_denoiser(seed=2), torch.tensor([1000.0, 750.0, 400.0, 0.0])
    config = SamplingConfig(steps=4, solver=Solver.euler, guidance_scale=1.0)
    unseen = random(2, 4, 4, 4, 4, seed=77)
    end = causal_trajectory(teacher, unseen, CLEAN, EMBEDS, NEGATIVE, config, MASK)[-1]
    start = torch.full((2, 4), 1000.0)

    @torch.no_grad()
    def distance(student) -> float:
        return in_context_loss(student, unseen, start, end, CLEAN, EMBEDS, MASK).item()

    for route in ("consistency", "ode"):
        student, generator = tiny_denoiser(seed=2), torch.Generator().manual_seed(0)
        optimizer, before = torch.optim.AdamW(student.parameters(), lr=2e-3), distance(student)
        for _ in range(30):
            noise = torch.randn(2, 4, 4, 4, 4, generator=generator)
            if route == "ode":
                states = causal_trajectory(teacher, noise, CLEAN, EMBEDS, NEGATIVE, config, MASK)
                levels = config.timesteps(teacher.schedule).tolist()
                noisy, told = pick_states(torch.stack(states[:-1], 1), levels, [(0, 4)], generator)
                target = states[-1]
            else:
                told, following = sample_step_pairs(2, [(0, 2), (2, 4)], grid, generator)
                noisy, pair = add_noise(CLEAN, noise, told), {"timesteps": told, "following": following}
                target = consistency_target(
                    student, teacher, noisy, CLEAN, EMBEDS, NEGATIVE, **pair, guidance_scale=1.0, block_mask=MASK
                )
            in_context_loss(student, noisy, told, target, CLEAN, EMBEDS, MASK).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert distance(student) < 0.8 * before, route
