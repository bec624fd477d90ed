"""Solvers follow the flow to the data. Steps are the same with guidance and with the cache."""

import pytest
import torch

from model.flow_matching import FlowMatching
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig, Solver, integrate, sample, sample_causal, trajectory
from tests.parity import random, relative_error, tiny_denoiser

PROMPT, NEGATIVE = random(2, 5, 8, seed=1), random(2, 5, 8, seed=2)
CHUNKS = RolloutConfig(frames_per_chunk=3)


def clip(frames=6):
    return random(2, frames, 4, 4, 6)


def solve(flow, noise, solver, steps, shift=5.0):
    config = SamplingConfig(steps=steps, solver=solver)
    return list(integrate(flow, noise, config.timesteps(FlowMatching(shift)), solver))


def gaussian_flow(spread):
    """Return the exact flow from noise to data with standard deviation `spread`. Its paths end at `spread * noise`."""

    def flow(latents, timestep):
        sigma = timestep / 1000
        variance = ((1 - sigma) * spread) ** 2 + sigma**2
        return latents * (sigma - (1 - sigma) * spread**2) / variance

    return flow


def passes(denoiser):
    """Return a list that receives the batch size of each later pass."""
    sizes = []
    denoiser.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    return sizes


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_reaches_the_data_of_a_straight_flow_exactly(steps):
    noise, data = random(8, 8), random(8, 8, seed=1)
    states = solve(lambda latents, timestep: noise - data, noise, Solver.euler, steps)
    assert len(states) == steps
    assert relative_error(states[-1], data) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_unipc_reaches_the_data_of_a_single_point_exactly(steps):
    """The flow always points at the data. The timesteps of solver and network differ by less than 1."""
    noise, data = random(8, 8), random(8, 8, seed=1)
    (*_, last) = solve(lambda latents, timestep: (latents - data) * 1000 / timestep, noise, Solver.unipc, steps)
    assert relative_error(last, data) <= 5e-3


def test_euler_converges_at_first_order_and_unipc_is_ahead_of_it():
    """UniPC stops converging at 3e-3, because whole timesteps cannot distinguish smaller differences of level."""
    noise = random(4, 64)

    def error(solver, steps):
        return relative_error(solve(gaussian_flow(0.5), noise, solver, steps, shift=1.0)[-1], 0.5 * noise)

    assert error(Solver.euler, 40) == pytest.approx(error(Solver.euler, 20) / 2, rel=0.1)
    assert error(Solver.euler, 1000) < 2e-3
    assert error(Solver.unipc, 10) < error(Solver.euler, 10) / 10
    assert error(Solver.unipc, 50) < error(Solver.euler, 50) / 4
    assert error(Solver.unipc, 200) < 3e-3


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_dpm_reaches_the_data_of_a_single_point_exactly(steps):
    noise, data = random(8, 8), random(8, 8, seed=1)
    (*_, last) = solve(lambda latents, timestep: (latents - data) * 1000 / timestep, noise, Solver.dpm, steps)
    assert relative_error(last, data) <= 1e-6


def test_dpm_is_ahead_of_euler_and_converges():
    noise = random(4, 64)

    def error(solver, steps):
        return relative_error(solve(gaussian_flow(0.5), noise, solver, steps, shift=1.0)[-1], 0.5 * noise)

    assert error(Solver.dpm, 10) < error(Solver.euler, 10) / 5
    assert error(Solver.dpm, 100) < error(Solver.dpm, 50) / 2
    assert error(Solver.dpm, 400) < 2e-4


@pytest.mark.parametrize("solver", list(Solver))
def test_half_precision_loses_nothing_between_the_steps(solver):
    """The network gets bfloat16, but 400 small steps add up in float32. In bfloat16 they would be lost."""
    noise = random(4, 64).bfloat16()
    seen = set()

    def flow(latents, timestep):
        seen.add(latents.dtype)
        return gaussian_flow(0.5)(latents.float(), timestep)

    states = solve(flow, noise, solver, 400)
    precise = solve(gaussian_flow(0.5), noise.float(), solver, 400)
    assert seen == {torch.bfloat16} and {state.dtype for state in states} == {torch.bfloat16}
    assert relative_error(states[-1].float(), precise[-1]) <= 0.004


def test_unipc_tells_apart_steps_that_share_a_whole_timestep():
    timesteps = SamplingConfig(steps=300).timesteps(FlowMatching(8.0))
    assert timesteps[0].int() == timesteps[1].int() == 999
    (*_, last) = solve(gaussian_flow(0.5), random(1, 8), Solver.unipc, 300, shift=8.0)
    assert relative_error(last, 0.5 * random(1, 8)) < 5e-3


def test_unipc_starts_below_pure_noise_and_euler_at_it():
    schedule = FlowMatching(5.0)
    assert torch.equal(SamplingConfig(steps=4, solver=Solver.euler).timesteps(schedule), schedule.grid(4))
    timesteps = SamplingConfig(steps=4, solver=Solver.unipc).timesteps(schedule)
    assert timesteps.int().tolist() == [999, 937, 833, 624]


@pytest.mark.parametrize("solver", Solver)
def test_a_trajectory_holds_the_noise_and_every_step_and_ends_in_the_sample(solver):
    denoiser, config = tiny_denoiser(), SamplingConfig(steps=5, solver=solver, guidance_scale=2.0)
    states = trajectory(denoiser, clip(), PROMPT, NEGATIVE, config)
    assert len(states) == 6
    assert torch.equal(states[0], clip())
    assert torch.equal(states[-1], sample(denoiser, clip(), PROMPT, NEGATIVE, config))
    assert not any(state.requires_grad for state in states)


def test_guidance_extrapolates_from_the_negative_prompt_and_1_is_none():
    """A single Euler step from pure noise gives x0 itself, so the result is linear in the scale."""
    denoiser = tiny_denoiser()

    def sampled(scale, prompt=PROMPT, negative=NEGATIVE):
        config = SamplingConfig(steps=1, solver=Solver.euler, guidance_scale=scale)
        return sample(denoiser, clip(), prompt, negative, config)

    conditional, unconditional = sampled(1), sampled(1, NEGATIVE)
    assert relative_error(sampled(4.0), unconditional + 4 * (conditional - unconditional)) <= 1e-5
    assert relative_error(sampled(0.0), unconditional) <= 1e-5
    assert relative_error(sampled(4.0, PROMPT, PROMPT), conditional) <= 1e-5


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 2), (3.0, 4)])
def test_guidance_1_skips_the_unconditional_half(scale, batch):
    denoiser, config = tiny_denoiser(), SamplingConfig(steps=3, solver=Solver.euler, guidance_scale=scale)
    sizes = passes(denoiser)
    sample(denoiser, clip(), PROMPT, NEGATIVE, config)
    assert sizes == [batch] * 3
    blocks = list(sample_causal(denoiser, clip(), PROMPT, NEGATIVE, CHUNKS, config))
    assert sizes[3:] == [batch] * (3 + 1 + 3)
    assert [(block.start_frame, block.latents.shape) for block in blocks] == [
        (0, (2, 3, 4, 4, 6)),
        (3, (2, 3, 4, 4, 6)),
    ]


@pytest.mark.parametrize("solver", Solver)
def test_the_first_causal_chunk_is_a_bidirectional_sample(solver):
    denoiser, config = tiny_denoiser(), SamplingConfig(steps=3, solver=solver, guidance_scale=3.0)
    first = next(iter(sample_causal(denoiser, clip(6), PROMPT, NEGATIVE, CHUNKS, config)))
    assert relative_error(first.latents, sample(denoiser, clip(6)[:, :3], PROMPT, NEGATIVE, config)) <= 1e-5


@pytest.mark.parametrize("solver", Solver)
def test_causal_samples_do_not_depend_on_their_batch(solver):
    denoiser, config = tiny_denoiser(), SamplingConfig(steps=3, solver=solver, guidance_scale=3.0)

    def run(rows):
        blocks = sample_causal(denoiser, clip()[rows], PROMPT[rows], NEGATIVE[rows], CHUNKS, config)
        return torch.cat([block.latents for block in blocks], dim=1)

    together = run(slice(None))
    for row in range(2):
        assert relative_error(together[row : row + 1], run(slice(row, row + 1))) <= 1e-5


def test_given_frames_are_context_of_both_halves():
    denoiser, config = tiny_denoiser(), SamplingConfig(steps=2, solver=Solver.euler, guidance_scale=3.0)

    def run(given):
        blocks = sample_causal(denoiser, clip(3), PROMPT, NEGATIVE, CHUNKS, config, context_latents=given)
        return next(iter(blocks))

    seen = run(random(2, 1, 4, 4, 6, seed=8))
    assert seen.start_frame == 1 and seen.latents.shape == (2, 3, 4, 4, 6)
    assert relative_error(seen.latents, run(random(2, 1, 4, 4, 6, seed=9)).latents) > 1e-3


def test_at_least_one_step():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        SamplingConfig(steps=0)
