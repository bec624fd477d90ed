"""GAN heads use the transformer's own features. Logits begin at zero, learn, and have a gradient to the video."""

import pytest
import torch

from model.attention import AttentionBackend
from model.discriminator import Discriminator, DiscriminatorConfig
from tests.parity import random, tiny_denoiser
from trainer.objectives.gan import AdversarialLoss, discriminator_logit_loss

TIMESTEPS, EMBEDS = torch.full((8, 2), 300.0), random(1, 5, 8).expand(8, -1, -1)


def tiny_discriminator(*, registers: int = 2, trained: bool = False) -> Discriminator:
    """Return heads on a transformer of two blocks. If `trained`, their last layer is not zero."""
    config = DiscriminatorConfig(depths=[0.5, 1.0], registers=registers)
    transformer = tiny_denoiser(seed=3).transformer
    discriminator = Discriminator(transformer, config, generator=torch.Generator().manual_seed(0))
    if trained:
        for index, head in enumerate(discriminator.heads):
            torch.nn.init.normal_(head.mlp[-1].weight, generator=torch.Generator().manual_seed(index))
    return discriminator


def test_features_are_the_hidden_states_the_output_is_made_of():
    transformer = tiny_denoiser().transformer
    latents, timesteps, embeds = random(2, 3, 4, 4, 4), torch.full((2, 3), 500.0), random(2, 5, 8)
    seen = []
    hooks = [block.register_forward_hook(lambda block, args, x: seen.append(x)) for block in transformer.blocks]
    transformer(latents, timesteps, embeds)
    for hook in hooks:
        hook.remove()
    first, last = transformer.features(latents, timesteps, embeds, [0, 1])
    assert first.shape == (2, 3, 4, 32)
    assert torch.equal(first, seen[0]) and torch.equal(last, seen[1])
    (alone,) = transformer.features(latents, timesteps, embeds, [1])
    assert torch.equal(alone, last)


def test_checkpointing_gives_the_same_gradients():
    latents = random(8, 2, 4, 4, 4)
    found = []
    for checkpointing in (False, True):
        discriminator = tiny_discriminator(trained=True)
        discriminator.transformer.gradient_checkpointing = checkpointing
        discriminator(latents, TIMESTEPS, EMBEDS).sum().backward()
        found.append({name: p.grad for name, p in discriminator.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@torch.no_grad()
def test_one_logit_a_depth_zero_at_first_and_of_each_sample_alone():
    latents = random(8, 2, 4, 4, 4)
    assert torch.equal(tiny_discriminator()(latents, TIMESTEPS, EMBEDS), torch.zeros(8, 2))
    discriminator = tiny_discriminator(trained=True)
    logits = discriminator(latents, TIMESTEPS, EMBEDS)
    assert logits.shape == (8, 2) and logits.std(0).min() > 1e-3
    assert torch.allclose(discriminator(latents[2:3], TIMESTEPS[:1], EMBEDS[:1]), logits[2:3], atol=1e-5)


def test_logits_depend_on_every_pixel_of_every_frame():
    latents = random(8, 2, 4, 4, 4).requires_grad_()
    tiny_discriminator(trained=True)(latents, TIMESTEPS, EMBEDS).sum().backward()
    assert latents.grad.abs().min() > 0


@torch.no_grad()
def test_a_head_reads_every_token_of_every_frame():
    head = tiny_discriminator(trained=True).heads[0]
    features = random(1, 2, 4, 32)
    before = head(features, backend=AttentionBackend.sdpa)
    for frame, token in ((0, 0), (0, 3), (1, 0), (1, 3)):
        changed = features.clone()
        changed[:, frame, token] += random(32, seed=1)
        assert (head(changed, backend=AttentionBackend.sdpa) - before).abs() > 1e-4


def test_heads_stay_in_float32_over_a_half_precision_backbone():
    discriminator = tiny_discriminator(trained=True)
    discriminator.transformer.bfloat16()
    logits = discriminator(random(8, 2, 4, 4, 4).bfloat16(), TIMESTEPS, EMBEDS.bfloat16())
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kind", AdversarialLoss)
def test_two_toy_worlds_are_told_apart_after_30_steps(kind):
    """It tells clips of flat frames from clips of random pixels. Single pixels have the same distribution in both."""
    generator = torch.Generator().manual_seed(0)

    def logits(discriminator: Discriminator) -> tuple[torch.Tensor, torch.Tensor]:
        real = torch.randn(8, 2, 4, 1, 1, generator=generator).expand(-1, -1, -1, 4, 4)
        fake = torch.randn(8, 2, 4, 4, 4, generator=generator)
        return discriminator(fake, TIMESTEPS, EMBEDS), discriminator(real, TIMESTEPS, EMBEDS)

    discriminator = tiny_discriminator()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3, betas=(0.0, 0.99))
    for _ in range(30):
        discriminator_logit_loss(*logits(discriminator), kind).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        fake, real = (torch.cat(drawn) for drawn in zip(*(logits(discriminator) for _ in range(4)), strict=True))
    right = (real[:, None] > fake).float().mean(dim=(0, 1))
    assert right.min() > 0.9


def test_official_depths_and_impossible_ones():
    config = DiscriminatorConfig()
    assert config.layers(30) == [13, 21, 29]
    assert config.layers(5) == [1, 3, 4]
    with pytest.raises(ValueError, match="one of them twice"):
        config.layers(2)
    for wrong in ({"depths": []}, {"depths": [0.5, 0.5]}, {"depths": [0.0, 1.0]}, {"depths": [1.1]}, {"registers": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiscriminatorConfig(**wrong)
