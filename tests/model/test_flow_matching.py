"""The schedule and the algebra of flow matching."""

import pytest
import torch

from model.flow_matching import FlowMatching, add_noise, flow_to_x0, x0_to_flow
from tests.parity import random, relative_error

SHAPE = (2, 4, 3, 2, 2)
TIMESTEPS = torch.tensor([[1000.0, 937.5, 3.0, 20.0], [0.0, 500.0, 1.0, 999.0]])


def test_noise_runs_from_the_data_to_pure_noise():
    x0, noise = random(*SHAPE), random(*SHAPE, seed=1)
    noisy = add_noise(x0, noise, TIMESTEPS)
    assert torch.equal(noisy[0, 0], noise[0, 0])
    assert torch.equal(noisy[1, 0], x0[1, 0])
    assert relative_error(noisy[1, 1], (x0 + noise)[1, 1] / 2) <= 1e-6


def test_flow_and_x0_say_the_same():
    x0, noise = random(*SHAPE), random(*SHAPE, seed=1)
    noisy, flow = add_noise(x0, noise, TIMESTEPS), noise - x0
    assert relative_error(flow_to_x0(flow, noisy, TIMESTEPS), x0) <= 1e-6
    noised = TIMESTEPS > 0
    assert relative_error(x0_to_flow(x0, noisy, TIMESTEPS)[noised], flow[noised]) <= 1e-3
    assert not x0_to_flow(random(*SHAPE, seed=2), noisy, TIMESTEPS)[1, 0].any()


def test_conversions_of_half_precision_are_computed_in_float32():
    x0, noise = random(*SHAPE).bfloat16(), random(*SHAPE, seed=1).bfloat16()
    for convert in (add_noise, flow_to_x0, x0_to_flow):
        result = convert(x0, noise, TIMESTEPS)
        assert result.dtype is torch.bfloat16
        assert torch.equal(result, convert(x0.float(), noise.float(), TIMESTEPS).bfloat16())


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_the_grid_descends_from_pure_noise_and_leaves_0_out(shift):
    schedule = FlowMatching(shift)
    for steps in (1, 4, 50, 1000):
        grid = schedule.grid(steps)
        assert grid.shape == (steps,) and grid[0] == 1000 and grid[-1] > 0
        assert (grid.diff() < 0).all()
    assert torch.allclose(FlowMatching(1.0).grid(4), torch.tensor([1000.0, 750.0, 500.0, 250.0]))


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_warped_steps_lie_on_the_grids_that_contain_them(shift):
    """Then points 0, 12, 24 and 36 of a trajectory of 48 steps are the student's own timesteps."""
    schedule = FlowMatching(shift)
    warped = schedule.warp([1000, 750, 500, 250, 0])
    assert warped[-1] == 0
    assert torch.allclose(torch.tensor(warped[:-1]), schedule.grid(48)[::12])
    assert torch.allclose(torch.tensor(warped[:-1]), schedule.grid(1000)[::250])


def test_shift_5_warps_to_the_published_steps():
    assert FlowMatching(5.0).warp([1000, 750, 500, 250]) == pytest.approx([1000, 937.5, 833.3333, 625])


def test_training_weights_peak_in_the_middle_with_mean_one():
    schedule = FlowMatching(5.0)
    weights = schedule.training_weight(schedule.grid(1000))
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.min() == 0
    assert schedule.training_weight(torch.tensor([500.0])) >= weights.max()


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match=r"shift=0 must be positive"):
        FlowMatching(0)
