"""ODE regression: states are drawn chunk by chunk, and clean ones do not count."""

import pytest
import torch

from model.attention import block_causal_mask
from model.denoiser import Prediction
from trainer.objectives.ode import ode_regression_loss, pick_states

TIMESTEPS = [1000.0, 937.5, 833.3, 625.0, 0.0]
CHUNKS = [(0, 1), (1, 4), (4, 7)]


def marked_trajectory(clips: int) -> torch.Tensor:
    """Return a trajectory [B S F C H W] whose values name the clip, the state and the frame: 100 b + 10 s + f."""
    b, s, f = torch.meshgrid(torch.arange(clips), torch.arange(5), torch.arange(7), indexing="ij")
    return (100.0 * b + 10 * s + f)[..., None, None, None].expand(-1, -1, -1, 2, 3, 3)


def test_a_chunk_takes_one_state_with_its_timestep():
    noisy, timesteps = pick_states(marked_trajectory(40), TIMESTEPS, CHUNKS, torch.Generator().manual_seed(0))
    assert noisy.shape == (40, 7, 2, 3, 3) and timesteps.shape == (40, 7)
    marks = noisy[..., 0, 0, 0].long()
    assert torch.equal(marks // 100, torch.arange(40)[:, None].expand(40, 7))
    assert torch.equal(marks % 10, torch.arange(7).expand(40, 7))
    states = marks // 10 % 10
    assert torch.equal(timesteps, torch.tensor(TIMESTEPS)[states])
    for start, end in CHUNKS:
        assert (states[:, start:end] == states[:, start : start + 1]).all()
        assert set(states[:, start].tolist()) == {0, 1, 2, 3, 4}
    assert (states[:, 1] != states[:, 4]).any() and (states[:, 0] != states[:, 1]).any()


def test_the_loss_is_the_error_of_the_endpoint_over_noised_frames_only():
    target = torch.zeros(1, 3, 2, 2, 2)
    predicted = torch.tensor([1.0, 100.0, 3.0]).view(1, 3, 1, 1, 1).expand_as(target)
    seen = {}

    def denoiser(noisy, timesteps, prompt_embeds, *, block_mask) -> Prediction:
        seen.update(noisy=noisy, mask=block_mask)
        return Prediction(None, predicted)

    mask, noisy = block_causal_mask(3, 1), torch.randn(1, 3, 2, 2, 2)
    timesteps = torch.tensor([[1000.0, 0.0, 625.0]])
    loss = ode_regression_loss(denoiser, noisy, timesteps, target, torch.zeros(1, 4, 8), mask)
    assert loss.item() == pytest.approx((1 + 9) / 2)
    assert seen["mask"] is mask and seen["noisy"] is noisy
