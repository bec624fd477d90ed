"""Windows of long rollouts: the frames that the scores get, and the frames with gradient."""

import pytest
import torch

from model.kv_cache import KVCache
from pipeline.rollout import RolloutConfig, rollout
from tests.parity import gradients, random, relative_error, tiny_denoiser
from tests.shapes_parts import CODEC, tiny_codec
from trainer.objectives.dmd import dmd_loss
from trainer.objectives.long import draw_length, draw_switch, later_frames, score_window, visible_history
from trainer.objectives.sid import sid_loss


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


def test_a_window_begins_with_the_last_pixel_frame_of_its_first_latent(codec):
    latents = random(2, 11, CODEC.latent_channels, 4, 4)
    window = score_window(latents, 6, codec)
    assert window.shape == (2, 6, CODEC.latent_channels, 4, 4) and torch.equal(window[:, 1:], latents[:, 6:])
    pixels = codec.decode(latents)
    assert codec.num_frames(6) == 21  # pixel frame 20 is the last that latents 0 ... 5 decode to
    assert torch.allclose(window[:, :1], codec.encode(pixels[:, 20:21]), atol=1e-4)
    assert (window[:, 0] - latents[:, 5]).abs().max() > 0.1


def test_a_rollout_of_the_window_itself_is_left_as_it_is(codec):
    latents = random(1, 6, CODEC.latent_channels, 4, 4)
    assert score_window(latents, 6, codec) is latents


def test_no_gradient_passes_the_encoding_nor_what_came_before(codec):
    latents = random(1, 9, CODEC.latent_channels, 4, 4).requires_grad_()
    score_window(latents, 4, codec).square().sum().backward()
    assert not latents.grad[:, :6].any() and latents.grad[:, 6:].all()


@pytest.mark.parametrize("loss", [dmd_loss, sid_loss])
def test_a_frame_that_does_not_count_changes_neither_loss_nor_gradient_directly(loss):
    """The loss is the mean of the formula over the counted frames. A given first frame only conditions the scores."""
    real, fake = tiny_denoiser(seed=1), tiny_denoiser(seed=2)
    x0 = random(2, 3, 4, 4, 4).requires_grad_()
    batch = {
        "timesteps": torch.tensor([[300.0], [800.0]]),
        "noise": random(2, 3, 4, 4, 4, seed=3),
        "real_guidance_scale": 0.0,
    }
    embeds = random(2, 5, 8)
    whole = loss(x0, real, fake, embeds, embeds, **batch)
    later = loss(x0, real, fake, embeds, embeds, **batch, counted=later_frames(3, x0.device))
    first = loss(x0, real, fake, embeds, embeds, **batch, counted=torch.tensor([True, False, False]))
    assert torch.allclose(whole.loss, (2 * later.loss + first.loss) / 3, rtol=1e-4)
    (of_later,) = torch.autograd.grad(later.loss, x0)
    if loss is dmd_loss:
        assert not of_later[:, 0].any() and of_later[:, 1:].all()
    nothing = loss(x0, real, fake, embeds, embeds, **batch, counted=torch.zeros(3, dtype=torch.bool))
    assert nothing.loss == 0


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (4, 0), (6, 2), (9, 1)])
def test_the_visible_history_is_all_the_next_chunk_needs(window, sink):
    """A rollout that continues from it equals one whose context is the whole history, encoded in the same way."""
    config = RolloutConfig(frames_per_chunk=2, window=window, sink=sink, warp_denoising_step=False)
    history = random(1, 8, 4, 4, 4)
    visible = visible_history(history, 2, window, sink)
    assert visible.shape[1] == (8 if window is None else min(8, window - 2))
    if window is not None and window < 10:
        assert torch.equal(visible[:, :sink], history[:, :sink])
        assert torch.equal(visible[:, sink:], history[:, 8 - (visible.shape[1] - sink) :])
    denoiser = tiny_denoiser()
    (block,) = rollout(
        denoiser,
        random(1, 2, 4, 4, 4, seed=5),
        random(1, 5, 8),
        KVCache(2),
        config,
        context_latents=visible,
        generator=torch.Generator().manual_seed(0),
    )
    assert block.latents.isfinite().all() and block.start_frame == visible.shape[1]


def test_only_the_window_of_a_long_rollout_carries_gradient(codec):
    """Earlier frames have no gradient. The parameters have the gradient of a rollout with given earlier frames."""
    denoiser, embeds, noise = tiny_denoiser(), random(1, 5, 8), random(1, 6, 4, 4, 4)
    config = RolloutConfig(denoising_steps=[1000.0], frames_per_chunk=2, warp_denoising_step=False)

    def roll(noise, grad_start_frame, context=None):
        cache = KVCache(2, append_only=True)
        options = {"context_latents": context, "grad_start_frame": grad_start_frame}
        return torch.cat([b.latents for b in rollout(denoiser, noise, embeds, cache, config, **options)], dim=1)

    video = roll(noise, 2)
    video[:, 2:].square().mean().backward()
    taken = gradients(denoiser)
    again = roll(noise[:, 2:], 2, context=video[:, :2].detach())
    again.square().mean().backward()
    assert max(relative_error(taken[name], value) for name, value in gradients(denoiser).items()) < 1e-3


def test_lengths_and_switches_are_uniform_over_what_is_allowed():
    generator = torch.Generator().manual_seed(0)
    lengths = [draw_length(6, 13, 3, generator) for _ in range(300)]
    assert set(lengths) == {6, 9, 12} and min(map(lengths.count, {6, 9, 12})) > 70
    switches = [draw_switch(4, 0.5, generator) for _ in range(600)]
    assert set(switches) == {1, 2, 3, 4} and 240 < switches.count(4) < 360
    assert min(map(switches.count, (1, 2, 3))) > 60
    assert {draw_switch(1, 1.0, generator), draw_switch(3, 0.0, generator)} == {1, 3}
