"""Diffusion training: noise levels cover the range, the loss is the flow's error, and each frame has its context."""

import pytest
import torch

from model.attention import block_causal_mask, teacher_forcing_mask
from model.denoiser import Denoiser, Prediction
from model.flow_matching import FlowMatching, add_noise, expand_sigma
from tests.shapes_parts import SIZES, tiny_transformer
from trainer.objectives.diffusion import flow_matching_loss, forcing_loss, sample_levels, sample_timesteps

SHAPE = (2, 4, SIZES.in_dim, 4, 4)
CHUNK = 2


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(tiny_transformer(0), FlowMatching(5.0))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {
        "x0": randn(*SHAPE, seed=0),
        "prompt_embeds": randn(2, 16, 16, seed=1),
        "timesteps": torch.tensor([[900.0, 900.0, 300.0, 300.0], [100.0, 100.0, 700.0, 700.0]]),
        "noise": randn(*SHAPE, seed=2),
    }


@pytest.fixture
def predictions(denoiser, monkeypatch) -> list[Prediction]:
    """Give a list that receives every prediction of the denoiser."""
    made = []
    forward = denoiser.forward

    def record(*args, **kwargs):
        made.append(forward(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(denoiser, "forward", record)
    return made


def test_levels_have_one_draw_in_each_interval_in_shuffled_order():
    levels = sample_levels((8, 25), torch.Generator().manual_seed(0))
    assert levels.shape == (8, 25) and levels.min() > 0 and levels.max() < 1
    ordered = levels.flatten().sort().values
    assert torch.equal((ordered * 200).floor(), torch.arange(200.0))
    assert not torch.equal(levels.flatten(), ordered)
    assert abs(torch.corrcoef(torch.stack([levels.flatten(), torch.arange(200.0)]))[0, 1]) < 0.2


def test_timesteps_are_shifted_and_shared_within_a_chunk():
    schedule = FlowMatching(5.0)
    timesteps = sample_timesteps(50, [(0, 1), (1, 4), (4, 7)], schedule, torch.Generator().manual_seed(0))
    assert timesteps.shape == (50, 7)
    assert torch.equal(timesteps[:, 1], timesteps[:, 3]) and torch.equal(timesteps[:, 4], timesteps[:, 6])
    assert not (timesteps[:, 0] == timesteps[:, 1]).any() and not (timesteps[:, 3] == timesteps[:, 4]).any()
    assert 0 < timesteps.min() < 50 and 990 < timesteps.max() < 1000
    half = schedule.timestep(torch.tensor(0.5)).item()
    assert (timesteps[:, [0, 1, 4]] > half).float().mean() == pytest.approx(0.5, abs=0.01)


def test_without_a_floor_the_loss_is_the_error_of_the_flow(denoiser, batch):
    noisy = add_noise(batch["x0"], batch["noise"], batch["timesteps"])
    prediction = denoiser(noisy, batch["timesteps"], batch["prompt_embeds"])
    expected = (prediction.flow - (batch["noise"] - batch["x0"])).square().mean()
    assert torch.allclose(flow_matching_loss(prediction, batch["x0"], batch["timesteps"]), expected, rtol=1e-4)


def test_a_floor_bounds_the_weight_of_low_noise_only(denoiser, batch):
    prediction = Prediction(None, batch["x0"] + 1)
    timesteps = torch.tensor([[1000.0, 500.0, 100.0, 10.0]]).expand(2, 4)
    plain = flow_matching_loss(prediction, batch["x0"], timesteps)
    floored = flow_matching_loss(prediction, batch["x0"], timesteps, sigma_floor=0.4)
    assert plain.item() == pytest.approx((1 + 4 + 100 + 10000) / 4, rel=1e-4)
    assert floored.item() == pytest.approx((1 + 4 + 6.25 + 6.25) / 4, rel=1e-4)


def test_weights_scale_the_error_of_their_frames():
    x0 = torch.zeros(SHAPE)
    error = torch.arange(4.0).view(1, 4, 1, 1, 1)
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    loss = flow_matching_loss(Prediction(None, x0 + error), x0, torch.full((2, 4), 1000.0), weights=weights)
    assert loss.item() == pytest.approx((2 * 4 + 9) / 8)


def test_bell_weights_follow_the_schedule(denoiser, batch, predictions):
    loss = forcing_loss(denoiser, **batch, block_mask=None, bell_weights=True)
    weights = denoiser.schedule.training_weight(batch["timesteps"])[..., None, None, None]
    error = (predictions[0].x0 - batch["x0"]) / expand_sigma(batch["timesteps"])
    assert torch.allclose(loss, (weights * error.square()).mean(), rtol=1e-4)
    assert not torch.allclose(loss, error.square().mean(), rtol=1e-2)


def other_noise_in_the_first_chunk(batch: dict) -> dict:
    noise = batch["noise"].clone()
    noise[:, :CHUNK] = randn(2, CHUNK, *SHAPE[2:], seed=9)
    return batch | {"noise": noise}


def other_last_chunk(batch: dict) -> dict:
    x0 = batch["x0"].clone()
    x0[:, CHUNK:] = randn(2, CHUNK, *SHAPE[2:], seed=9)
    return batch | {"x0": x0}


def test_diffusion_forcing_learns_from_noisy_context_and_never_from_the_future(denoiser, batch, predictions):
    mask = block_causal_mask(4, CHUNK)
    for variant in (batch, other_noise_in_the_first_chunk(batch), other_last_chunk(batch)):
        forcing_loss(denoiser, **variant, block_mask=mask)
    plain, other_context, other_future = (prediction.x0 for prediction in predictions)
    assert (plain - other_context)[:, CHUNK:].abs().max() > 1e-3
    assert (plain - other_future)[:, :CHUNK].abs().max() <= 1e-5


def test_teacher_forcing_learns_from_clean_context_alone(denoiser, batch, predictions):
    mask = teacher_forcing_mask(4, CHUNK)
    other_past = batch | {"x0": torch.cat([randn(2, CHUNK, *SHAPE[2:], seed=9), batch["x0"][:, CHUNK:]], dim=1)}
    for variant in (batch, other_noise_in_the_first_chunk(batch), other_last_chunk(batch), other_past):
        forcing_loss(denoiser, **variant, block_mask=mask, teacher_forcing=True)
    plain, other_noise, other_future, other_past = (prediction.x0[:, 4:] for prediction in predictions)
    assert (plain - other_noise)[:, CHUNK:].abs().max() <= 1e-5
    assert (plain - other_future)[:, :CHUNK].abs().max() <= 1e-5
    assert (plain - other_past)[:, CHUNK:].abs().max() > 1e-3


def test_teacher_forcing_scores_the_noisy_half(denoiser, batch, predictions):
    loss = forcing_loss(denoiser, **batch, block_mask=teacher_forcing_mask(4, CHUNK), teacher_forcing=True)
    error = (predictions[0].flow[:, 4:] - (batch["noise"] - batch["x0"])).square().mean()
    assert predictions[0].x0.shape[1] == 8
    assert torch.allclose(loss, error, rtol=1e-4)


def test_bidirectional_training_sees_the_future(denoiser, batch, predictions):
    for variant in (batch, other_last_chunk(batch)):
        forcing_loss(denoiser, **variant, block_mask=None)
    plain, other_future = (prediction.x0 for prediction in predictions)
    assert (plain - other_future)[:, :CHUNK].abs().max() > 1e-3


@torch.no_grad()
def test_noise_augmentation_noises_the_clean_context_and_tells_the_network_so(denoiser, batch):
    """The loss of a chunk equals that of a pass whose context is noised by hand. At timestep 0 nothing changes."""
    mask, context = teacher_forcing_mask(4, CHUNK), torch.tensor([[80.0, 80.0, 40.0, 40.0], [10.0, 10.0, 60.0, 60.0]])
    options = {"block_mask": mask, "teacher_forcing": True}
    noised = add_noise(batch["x0"], batch["noise"], context)
    noisy = add_noise(batch["x0"], batch["noise"], batch["timesteps"])
    prediction = denoiser(
        torch.cat([noised, noisy], 1),
        torch.cat([context, batch["timesteps"]], 1),
        batch["prompt_embeds"],
        block_mask=mask,
    )
    by_hand = Prediction(*(part[:, 4:] for part in prediction))
    expected = flow_matching_loss(by_hand, batch["x0"], batch["timesteps"])
    augmented = forcing_loss(denoiser, **batch, **options, context_timesteps=context)
    assert torch.allclose(augmented, expected, rtol=1e-5)
    clean = forcing_loss(denoiser, **batch, **options)
    assert torch.allclose(clean, forcing_loss(denoiser, **batch, **options, context_timesteps=torch.zeros(2, 4)))
    assert not torch.allclose(clean, augmented, rtol=1e-4)


@pytest.mark.parametrize("highest", [100.0, 500.0, 1000.0])
def test_timesteps_stay_below_a_maximum_that_counts_after_the_shift(highest):
    generator = torch.Generator().manual_seed(0)
    drawn = sample_timesteps(4000, [(0, 2), (2, 4)], FlowMatching(5.0), generator, highest=highest)
    assert drawn.min() > 0 and 0.99 * highest < drawn.max() <= highest
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and not torch.equal(drawn[:, 1], drawn[:, 2])
