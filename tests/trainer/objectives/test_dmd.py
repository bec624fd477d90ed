"""Distribution matching distillation agrees with its formulas, and its gradient reaches only the generator."""

import math

import pytest
import torch

from model.denoiser import Denoiser, Prediction
from model.flow_matching import FlowMatching, add_noise
from tests.shapes_parts import SIZES, tiny_transformer
from trainer.objectives.dmd import critic_loss, dmd_loss, guided_x0, sample_score_timesteps
from trainer.objectives.sid import sid_loss

SHAPE = (2, 3, SIZES.in_dim, 4, 4)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def scores() -> list[Denoiser]:
    """Real score, fake score, generator."""
    return [Denoiser(tiny_transformer(seed), FlowMatching(5.0)) for seed in range(3)]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": randn(2, 16, 16, seed=1),
        "negative_embeds": randn(2, 16, 16, seed=2),
        "timesteps": torch.tensor([[300.0], [800.0]]),
        "noise": randn(*SHAPE, seed=3),
    }


def test_score_timesteps_are_shifted_whole_levels_within_bounds():
    schedule = FlowMatching(5.0)
    timesteps = sample_score_timesteps(4000, schedule, torch.Generator().manual_seed(0))
    assert timesteps.shape == (4000, 1) and timesteps.min() == 20 and timesteps.max() == 980
    grid = schedule.timestep(torch.arange(1000) / 1000).clamp(20, 980)
    assert torch.isin(timesteps, grid).all()
    assert (timesteps > schedule.timestep(torch.tensor(0.5))).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("lowest", "highest"), [(250.0, 1000.0), (0.0, 500.0), (500.0, 750.0)])
def test_score_timesteps_may_be_bounded_before_the_shift(lowest, highest):
    """ts_schedule and ts_schedule_max draw whole levels in [lowest, highest) with equal probability."""
    schedule = FlowMatching(5.0)
    drawn = sample_score_timesteps(4000, schedule, torch.Generator().manual_seed(0), lowest=lowest, highest=highest)
    allowed = schedule.timestep(torch.arange(lowest, highest) / 1000).clamp(20, 980)
    assert torch.isin(drawn, allowed).all() and len(drawn.unique()) > 0.9 * len(allowed.unique())
    middle = schedule.timestep(torch.tensor((lowest + highest) / 2000))
    assert (drawn > middle).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("lowest", "highest"), [(500.0, 500.0), (-1.0, 10.0), (0.0, 1001.0)])
def test_bounds_that_hold_no_timestep_are_refused(lowest, highest):
    with pytest.raises(ValueError, match="must satisfy 0 <= lowest < highest <= 1000"):
        sample_score_timesteps(1, FlowMatching(5.0), torch.Generator(), lowest=lowest, highest=highest)


@pytest.mark.parametrize("loss", [dmd_loss, sid_loss])
def test_the_fake_score_may_be_guided_too(scores, batch, loss):
    """A guided fake score has x0 = ``c + g (c - u)``. Without guidance nothing changes."""

    class Guided(torch.nn.Module):
        def forward(self, latents, timesteps, prompt_embeds):
            arguments = latents, timesteps, batch["prompt_embeds"], batch["negative_embeds"], 1.5
            return Prediction(latents, guided_x0(scores[1], *arguments))

    x0 = randn(*SHAPE, seed=9)
    embeds = batch["prompt_embeds"], batch["negative_embeds"]
    drawn = {"timesteps": batch["timesteps"], "noise": batch["noise"], "real_guidance_scale": 2.0}
    plain = loss(x0, scores[0], scores[1], *embeds, **drawn).loss
    guided = loss(x0, scores[0], scores[1], *embeds, **drawn, fake_guidance_scale=1.5).loss
    assert torch.allclose(guided, loss(x0, scores[0], Guided(), *embeds, **drawn).loss, rtol=1e-4)
    assert torch.equal(plain, loss(x0, scores[0], scores[1], *embeds, **drawn, fake_guidance_scale=0.0).loss)
    assert not torch.allclose(plain, guided, rtol=1e-3)


def test_the_critic_may_leave_frames_out(scores, batch):
    x0, drawn = randn(*SHAPE, seed=9), {"timesteps": batch["timesteps"], "noise": batch["noise"]}
    first, later = (torch.tensor(counted) for counted in ([True, False, False], [False, True, True]))
    whole, one, two = (
        critic_loss(x0, scores[1], batch["prompt_embeds"], **drawn, counted=counted) for counted in (None, first, later)
    )
    assert torch.allclose(whole, (one + 2 * two) / 3, rtol=1e-4) and not torch.allclose(one, two, rtol=1e-3)


def test_guidance_is_c_plus_g_times_c_minus_u(scores, batch):
    noisy, timesteps = randn(*SHAPE, seed=0), batch["timesteps"].expand(-1, 3)
    arguments = (scores[0], noisy, timesteps, batch["prompt_embeds"], batch["negative_embeds"])
    with torch.no_grad():
        conditional = scores[0](noisy, timesteps, batch["prompt_embeds"]).x0
        unconditional = scores[0](noisy, timesteps, batch["negative_embeds"]).x0
    assert torch.allclose(
        guided_x0(*arguments, 3.0), conditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(conditional, unconditional, atol=1e-2)


def test_no_guidance_equals_the_conditional_score_and_runs_no_negative_batch(scores, batch):
    noisy, timesteps, sizes = randn(*SHAPE, seed=0), batch["timesteps"].expand(-1, 3), []
    scores[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    result = guided_x0(scores[0], noisy, timesteps, batch["prompt_embeds"], torch.full((2, 16, 16), math.nan), 0)
    assert sizes == [2]
    assert torch.equal(result, scores[0](noisy, timesteps, batch["prompt_embeds"]).x0)


def test_the_gradient_is_fake_minus_real_over_the_distance_to_real(scores, batch):
    real_score, fake_score, _ = scores
    x0 = randn(*SHAPE, seed=0).requires_grad_()
    result = dmd_loss(x0, real_score, fake_score, **batch, real_guidance_scale=2.0)
    result.loss.backward()

    timesteps = batch["timesteps"].expand(-1, 3)
    with torch.no_grad():
        noisy = add_noise(x0, batch["noise"], timesteps)
        fake = fake_score(noisy, timesteps, batch["prompt_embeds"]).x0
        real_c = real_score(noisy, timesteps, batch["prompt_embeds"]).x0
        real_u = real_score(noisy, timesteps, batch["negative_embeds"]).x0
        real = real_c + 2.0 * (real_c - real_u)
        expected = torch.stack([(fake[b] - real[b]) / (x0[b] - real[b]).abs().mean() for b in range(2)])
    assert torch.allclose(x0.grad * x0.numel(), expected, rtol=1e-3, atol=1e-4)
    assert result.loss.item() == pytest.approx(0.5 * expected.square().mean().item(), rel=1e-3)
    assert result.gradient_norm.item() == pytest.approx(expected.abs().mean().item(), rel=1e-4)


def test_a_videos_gradient_does_not_depend_on_its_batch(scores, batch):
    x0 = randn(*SHAPE, seed=0).requires_grad_()
    dmd_loss(x0, *scores[:2], **batch, real_guidance_scale=1.0).loss.backward()
    alone = x0.detach()[:1].requires_grad_()
    first = {name: value[:1] for name, value in batch.items()}
    dmd_loss(alone, *scores[:2], **first, real_guidance_scale=1.0).loss.backward()
    assert torch.allclose(alone.grad, 2 * x0.grad[:1], rtol=1e-3, atol=1e-6)


def test_the_generator_learns_from_its_loss_and_neither_score_does(scores, batch):
    real_score, fake_score, generator = scores
    x0 = generator(batch["noise"], torch.full((2, 3), 1000.0), batch["prompt_embeds"]).x0
    dmd_loss(x0, real_score, fake_score, **batch, real_guidance_scale=1.0).loss.backward()
    assert all(parameter.grad is None for score in (real_score, fake_score) for parameter in score.parameters())
    gradients = [parameter.grad for parameter in generator.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_the_critic_learns_from_its_loss_and_the_generator_does_not(scores, batch):
    _, fake_score, generator = scores
    x0 = generator(batch["noise"], torch.full((2, 3), 1000.0), batch["prompt_embeds"]).x0
    critic_batch = {name: batch[name] for name in ("prompt_embeds", "timesteps")}
    critic_loss(x0, fake_score, **critic_batch, noise=randn(*SHAPE, seed=8)).backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in fake_score.parameters())


def test_the_critics_loss_is_flow_matching_on_the_generated_video(scores, batch):
    x0, timesteps = randn(*SHAPE, seed=0), batch["timesteps"].expand(-1, 3)
    loss = critic_loss(x0, scores[1], batch["prompt_embeds"], timesteps=batch["timesteps"], noise=batch["noise"])
    flow = scores[1](add_noise(x0, batch["noise"], timesteps), timesteps, batch["prompt_embeds"]).flow
    assert torch.allclose(loss, (flow - (batch["noise"] - x0)).square().mean(), rtol=1e-4)


def test_a_score_that_is_not_finite_shows_in_the_loss(scores, batch):
    def broken(*args) -> Prediction:
        return Prediction(None, torch.full(SHAPE, math.nan))

    x0 = randn(*SHAPE, seed=0).requires_grad_()
    loss, norm = dmd_loss(x0, scores[0], broken, **batch, real_guidance_scale=0)
    assert not loss.isfinite() and not norm.isfinite()
