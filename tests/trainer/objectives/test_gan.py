"""Adversarial losses: their formulas, the finite-difference penalty and the exact one, and missing gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.discriminator import Discriminator, DiscriminatorConfig
from model.flow_matching import add_noise
from tests.parity import gradients, random, relative_error, tiny_denoiser
from trainer.objectives.gan import (
    AdversarialLoss,
    discriminator_logit_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    generator_logit_loss,
    gradient_penalty,
)

RELATIVISTIC, NON_SATURATING = AdversarialLoss.relativistic, AdversarialLoss.non_saturating
FAKE, REAL, NOISE = (random(2, 3, 4, 4, 4, seed=seed) for seed in range(3))
EMBEDS, TIMESTEPS = random(2, 5, 8), torch.tensor([[300.0], [700.0]])


class Critic(nn.Module):
    """A smooth discriminator with two logits, which depends on timesteps and prompts too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * 64, 16), nn.Linear(16, 2)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=seed) / math.sqrt(parameter.shape[-1]))

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        told = timesteps.mean(1, keepdim=True) / 1000 + prompt_embeds.mean((1, 2))[:, None]
        return self.last((self.first(latents.flatten(1)) + told).tanh())


def noised(x: Tensor) -> Tensor:
    return add_noise(x, NOISE, TIMESTEPS.expand(2, 3))


def logits_of(critic: Critic, noisy: Tensor) -> Tensor:
    return critic(noisy, TIMESTEPS.expand(2, 3), EMBEDS)


def discriminator_loss(critic, *, fake=FAKE, real=REAL, kind=RELATIVISTIC, r1=0.0, r2=0.0, sigma=0.05):
    return gan_discriminator_loss(
        fake,
        real,
        critic,
        EMBEDS,
        timesteps=TIMESTEPS,
        noise=NOISE,
        perturbation=random(*FAKE.shape, seed=7),
        kind=kind,
        perturbation_sigma=sigma,
        r1_weight=r1,
        r2_weight=r2,
    )


def test_logit_losses_are_the_formulas():
    fake, real = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 0.25]])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = {
        (generator_logit_loss, RELATIVISTIC): (softplus(1.5) + softplus(1.25)) / 2,
        (generator_logit_loss, NON_SATURATING): (softplus(-0.5) + softplus(1.0)) / 2,
        (discriminator_logit_loss, RELATIVISTIC): (softplus(-1.5) + softplus(-1.25)) / 2,
        (discriminator_logit_loss, NON_SATURATING): sum(map(softplus, (-2.0, -0.25, 0.5, -1.0))) / 2,
    }
    for (loss, kind), value in expected.items():
        assert loss(fake, real, kind).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", AdversarialLoss)
def test_generator_loss_and_gradient(kind):
    critic, x = Critic(), FAKE.clone().requires_grad_()
    result = gan_generator_loss(x, REAL, critic, EMBEDS, timesteps=TIMESTEPS, noise=NOISE, kind=kind)
    result.loss.backward()
    assert gradients(critic) == {}

    by_hand = FAKE.clone().requires_grad_()
    fake, real = logits_of(critic, noised(by_hand)), logits_of(critic, noised(REAL))
    margin = fake - real if kind is RELATIVISTIC else fake
    loss = torch.log1p(torch.exp(-margin)).mean()
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(x.grad, by_hand.grad) < 1e-5
    assert result.gradient_norm.item() == pytest.approx(by_hand.grad.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", AdversarialLoss)
def test_discriminator_loss_with_both_penalties_and_its_gradients(kind):
    critic, x = Critic(), FAKE.clone().requires_grad_()
    result = discriminator_loss(critic, fake=x, kind=kind, r1=0.3, r2=0.7)
    result.loss.backward()
    taken = gradients(critic)
    assert x.grad is None

    perturbation = 0.05 * random(*FAKE.shape, seed=7)
    fake, real = logits_of(critic, noised(FAKE)), logits_of(critic, noised(REAL))
    r1 = ((logits_of(critic, noised(REAL) + perturbation) - real) ** 2).mean() / 0.05**2
    r2 = ((logits_of(critic, noised(FAKE) + perturbation) - fake) ** 2).mean() / 0.05**2
    if kind is RELATIVISTIC:
        loss = torch.log1p(torch.exp(fake - real)).mean()
    else:
        loss = torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean()
    (loss + 0.3 * r1 + 0.7 * r2).backward()
    assert result.loss.item() == pytest.approx((loss + 0.3 * r1 + 0.7 * r2).item(), rel=1e-4)
    assert result.penalty.item() == pytest.approx((0.3 * r1 + 0.7 * r2).item(), rel=1e-3)
    assert result.real_logit.item() == pytest.approx(real.mean().item(), rel=1e-4)
    assert result.fake_logit.item() == pytest.approx(fake.mean().item(), rel=1e-4)
    expected = gradients(critic)
    assert taken.keys() == expected.keys()
    for name in taken:
        torch.testing.assert_close(taken[name], expected[name], rtol=1e-3, atol=1e-4)


def test_each_penalty_looks_at_its_own_videos():
    critic, elsewhere = Critic(), FAKE + 3
    both, r1, r2 = ({"r1": 0.3, "r2": 0.7}, {"r1": 0.3}, {"r2": 0.7})
    parts = [discriminator_loss(critic, **weights).penalty for weights in (both, r1, r2)]
    assert parts[0].item() == pytest.approx((parts[1] + parts[2]).item(), rel=1e-3)
    assert discriminator_loss(critic, fake=elsewhere, **r1).penalty.item() == pytest.approx(parts[1].item(), rel=1e-3)
    assert discriminator_loss(critic, fake=elsewhere, **r2).penalty.item() != pytest.approx(parts[2].item(), rel=1e-2)
    assert discriminator_loss(critic).penalty == 0


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_finite_differences_approximate_the_exact_gradient_penalty(sigma):
    """With 8192 perturbations the estimate of ``|grad D|^2``, averaged over heads, is right within 5 %."""
    critic, count = Critic(), 8192
    noisy = noised(FAKE)[:1].requires_grad_()
    timesteps = TIMESTEPS[:1].expand(1, 3)
    logits = critic(noisy, timesteps, EMBEDS[:1])
    slopes = [torch.autograd.grad(logit, noisy, retain_graph=True)[0] for logit in logits[0]]
    exact = sum(slope.square().sum() for slope in slopes) / len(slopes)
    with torch.no_grad():
        perturbed = noisy + sigma * random(count, *noisy.shape[1:], seed=3)
        there = critic(perturbed, timesteps.expand(count, 3), EMBEDS[:1].expand(count, -1, -1))
        estimate = gradient_penalty(logits, there, sigma)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.05)


def test_relativistic_loss_teaches_nothing_where_generated_equals_real():
    critic = Critic()
    result = discriminator_loss(critic, fake=REAL, real=REAL)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert all(gradient.abs().max() < 1e-7 for gradient in gradients(critic).values())
    discriminator_loss(critic, fake=FAKE, real=REAL).loss.backward()
    assert all(gradient.abs().max() > 1e-4 for name, gradient in gradients(critic).items() if name != "last.bias")


def test_relativistic_generator_needs_real_videos():
    drawn = {"timesteps": TIMESTEPS, "noise": NOISE}
    with pytest.raises(ValueError, match="real_x0 is None"):
        gan_generator_loss(FAKE, None, Critic(), EMBEDS, **drawn, kind=RELATIVISTIC)
    assert gan_generator_loss(FAKE, None, Critic(), EMBEDS, **drawn, kind=NON_SATURATING).loss.isfinite()


def test_generated_videos_learn_to_pass_for_real_while_the_discriminator_stays_as_it_is():
    discriminator = Discriminator(tiny_denoiser().transformer, DiscriminatorConfig(depths=[0.5, 1.0], registers=2))
    for index, head in enumerate(discriminator.heads):
        nn.init.normal_(head.mlp[-1].weight, generator=torch.Generator().manual_seed(index))
    x, losses = FAKE.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(5):
        loss, norm = gan_generator_loss(
            x, REAL, discriminator, EMBEDS, timesteps=TIMESTEPS, noise=NOISE, kind=RELATIVISTIC
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert norm > 0
    assert losses[-1] < 0.9 * losses[0]
    assert gradients(discriminator) == {}


def test_the_weight_of_the_logits_leaves_the_penalties_alone():
    critic = Critic()
    drawn = {"timesteps": TIMESTEPS, "noise": NOISE, "perturbation": random(*FAKE.shape, seed=7), "kind": RELATIVISTIC}
    weights = {"perturbation_sigma": 0.05, "r1_weight": 0.3, "r2_weight": 0.7}
    whole = gan_discriminator_loss(FAKE, REAL, critic, EMBEDS, **drawn, **weights)
    tenth = gan_discriminator_loss(FAKE, REAL, critic, EMBEDS, **drawn, **weights, logit_weight=0.1)
    assert torch.equal(whole.penalty, tenth.penalty) and whole.penalty > 0
    assert torch.allclose(tenth.loss - tenth.penalty, 0.1 * (whole.loss - whole.penalty), rtol=1e-4)
