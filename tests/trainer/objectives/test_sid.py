"""Score identity distillation: its formula and gradient, the frozen networks, and the official recording."""

import pytest
import torch
from torch import Tensor

from model.flow_matching import add_noise
from tests.parity import gradients, needs_recordings, random, tiny_denoiser
from tests.test_parity import TOLERANCE, assert_close, assert_same_gradients, beyond_the_leak, inject, scored  # noqa: F401
from trainer.objectives.sid import sid_loss

X, NOISE = random(2, 3, 4, 4, 4), random(2, 3, 4, 4, 4, seed=1)
EMBEDS, NEGATIVE = random(2, 5, 8), random(2, 5, 8, seed=5)
TIMESTEPS = torch.tensor([[300.0], [800.0]])


@pytest.fixture
def scores():
    return tiny_denoiser(seed=1), tiny_denoiser(seed=2)


def by_hand(x: Tensor, real_score, fake_score, guidance: float, alpha: float, scale: Tensor | None = None) -> Tensor:
    """Compute the formula for each sample. `scale` replaces the normalisers when they must be constants."""
    losses = []
    for index in range(2):
        one = slice(index, index + 1)
        timesteps = TIMESTEPS[one].expand(1, 3)
        noisy = add_noise(x[one], NOISE[one], timesteps)
        c = real_score(noisy, timesteps, EMBEDS[one]).x0
        u = real_score(noisy, timesteps, NEGATIVE[one]).x0
        real, fake = c + guidance * (c - u), fake_score(noisy, timesteps, EMBEDS[one]).x0
        size = (x[one] - real).abs().mean() if scale is None else scale[index]
        product = (real - fake) * ((real - x[one]) - alpha * (real - fake))
        losses.append(product.mean() / size.detach())
    return sum(losses) / 2


def loss_of(x: Tensor, scores, alpha: float = 1.0, guidance: float = 2.0):
    drawn = {"timesteps": TIMESTEPS, "noise": NOISE}
    return sid_loss(x, *scores, EMBEDS, NEGATIVE, **drawn, real_guidance_scale=guidance, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_loss_and_gradient_are_those_of_the_formula(scores, alpha):
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    result, expected = loss_of(ours, scores, alpha), by_hand(theirs, *scores, 2.0, alpha)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    result.loss.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad, 1e-5)
    assert result.gradient_norm.item() == pytest.approx(theirs.grad.abs().sum().item(), rel=1e-5)


def test_gradient_passes_through_both_scores(scores):
    """With fixed scores, as in DMD, the gradient would differ, and the slope of the loss would be wrong."""
    x, direction, step = X.clone().requires_grad_(), random(*X.shape, seed=9), 1e-2
    loss_of(x, scores).loss.backward()
    slope = (x.grad * direction).sum().item()
    with torch.no_grad():
        noisy = add_noise(X, NOISE, TIMESTEPS.expand(2, 3))
        c, u = (scores[0](noisy, TIMESTEPS.expand(2, 3), embeds).x0 for embeds in (EMBEDS, NEGATIVE))
        real, fake = c + 2.0 * (c - u), scores[1](noisy, TIMESTEPS.expand(2, 3), EMBEDS).x0
        scale = (X - real).abs().mean(dim=(1, 2, 3, 4))
        ahead, behind = (by_hand(X + sign * step * direction, *scores, 2.0, 1.0, scale) for sign in (1, -1))
    assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=0.02)
    frozen = -((real - fake) / scale.view(2, 1, 1, 1, 1) * direction).sum() / X.numel()
    assert abs(slope - frozen.item()) > 0.1 * abs(slope)


def test_alpha_takes_off_the_squared_score_difference(scores):
    at_zero, at_half, at_one = (loss_of(X, scores, alpha).loss.item() for alpha in (0.0, 0.5, 1.0))
    assert at_one < at_zero
    assert at_half == pytest.approx((at_zero + at_one) / 2, rel=1e-5)


def test_nothing_pulls_where_the_scores_agree(scores):
    x = X.clone().requires_grad_()
    result = loss_of(x, (scores[0], scores[0]), guidance=0.0)
    result.loss.backward()
    assert result.loss.item() == 0 and result.gradient_norm < 1e-6 and x.grad.abs().max() < 1e-6


def test_scores_get_no_gradient_and_keep_the_one_they_have(scores):
    held = random(*scores[1].transformer.head.head.weight.shape, seed=4)
    scores[1].transformer.head.head.weight.grad = held.clone()
    loss_of(X.clone().requires_grad_(), scores).loss.backward()
    assert gradients(scores[0]) == {}
    left = gradients(scores[1])
    assert [*left] == ["transformer.head.head.weight"] and torch.equal(*left.values(), held)


def test_a_broken_score_shows_in_the_loss(scores):
    broken = tiny_denoiser(seed=3)
    with torch.no_grad():
        broken.transformer.head.head.bias[0] = float("nan")
    assert not loss_of(X.clone().requires_grad_(), (scores[0], broken)).loss.isfinite()


@needs_recordings
def test_09d_sid_generator(scored):  # noqa: F811
    case, meta, common, generator, video, (real, fake), drawn = scored("case09d_sid_generator")
    assert_close(drawn["timesteps"].expand(-1, 9), case["log.timestep"], 1e-6)
    args = meta["args"]
    loss, _ = sid_loss(
        video,
        real,
        fake,
        common["prompt_embeds"],
        common["negative_embeds"],
        **drawn,
        real_guidance_scale=args["guidance_scale"],
        alpha=args["sid_alpha"],
    )
    assert loss.item() == pytest.approx(meta["loss"], rel=TOLERANCE)
    loss.backward()
    assert gradients(real) == {} and gradients(fake) == {}
    assert_same_gradients(generator, case, meta["grad_norms"], beyond_the_leak, full=2)
