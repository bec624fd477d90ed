"""The fixed linear code, and a TinyVAE that computes it."""

from dataclasses import replace

import pytest
import torch

from model.tiny_vae import TinyVAE
from tests.shapes_parts import CODEC
from trainer.objectives.codec import LinearCode, decoder_loss, disturb, fit_linear_code, psnr, random_window
from utils.shapes import render_clips, training_scenes


def clips(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scenes = training_scenes()
    picks = torch.randperm(len(scenes), generator=generator)[:count]
    return render_clips([scenes[i] for i in picks], 9, generator)


@pytest.fixture(scope="module")
def code() -> LinearCode:
    return fit_linear_code(clips(24, seed=0), CODEC)


@pytest.fixture(scope="module")
def codec(code: LinearCode) -> TinyVAE:
    torch.manual_seed(0)
    model = TinyVAE(CODEC)
    code.write_to(model)
    return model.eval()


@torch.no_grad()
def test_encoder_computes_the_linear_code_exactly(code: LinearCode, codec: TinyVAE) -> None:
    frames = clips(6, seed=1)
    assert torch.allclose(codec.encode(frames), code.encode(frames), atol=2e-5)


def test_channels_are_centred_uncorrelated_and_never_amplified_past_the_third(code: LinearCode) -> None:
    latents = code.encode(clips(24, seed=0)).movedim(2, 0).flatten(1)
    assert latents.mean(1).abs().max() < 1e-3
    covariance = torch.cov(latents)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    deviations = covariance.diag().sqrt()
    assert torch.allclose(deviations[:3], torch.ones(3), atol=1e-3)
    assert (deviations[3:] <= 1.001).all()
    assert torch.all(code.scale[3:] == code.scale[2])


@torch.no_grad()
def test_untrained_decoder_already_inverts_the_code(codec: TinyVAE) -> None:
    frames = clips(6, seed=1)
    assert psnr(codec.decode(codec.encode(frames)), frames) > 27


def test_decoder_learns(codec: TinyVAE) -> None:
    frames = clips(2, seed=2)
    latents = codec.encode(frames).detach()
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), lr=3e-4)
    losses = []
    for _ in range(8):
        loss = decoder_loss(codec.decode(latents, clamp=False), frames, motion_weight=0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_decoder_loss_counts_pixels_and_their_change() -> None:
    frames = torch.zeros(1, 3, 3, 2, 2)
    constant, flicker = torch.full_like(frames, 0.5), frames.clone()
    flicker[:, 1] = 0.5
    assert decoder_loss(constant, frames, motion_weight=4.0) == pytest.approx(0.25)
    assert decoder_loss(flicker, frames, motion_weight=4.0) == pytest.approx(0.25 / 3 + 4 * 0.25)
    assert psnr(constant, frames) == pytest.approx(12.0412, abs=1e-3)


def test_beyond_white_and_black_is_no_error_where_the_picture_is_white_or_black() -> None:
    ends, beyond = torch.tensor([1.0, -1.0]), torch.tensor([1.4, -1.4])
    target, decoded = (values.view(1, 1, 1, 1, 2).expand(1, 3, 3, 2, 2) for values in (ends, beyond))
    assert decoder_loss(decoded, target, motion_weight=1.0) == 0
    assert decoder_loss(decoded, 0.9 * target, motion_weight=1.0) == pytest.approx(0.25)
    assert decoder_loss(0.9 * target, target, motion_weight=1.0) == pytest.approx(0.01)


def test_disturbance_differs_between_clips_and_stays_below_its_strength() -> None:
    noise = disturb(torch.zeros(64, 3, 16, 6, 6), 0.1, torch.Generator().manual_seed(0))
    deviations = noise.flatten(1).std(1)
    assert deviations.min() < 0.02 and 0.08 < deviations.max() < 0.105


def test_random_windows_are_successive_frames_from_every_start() -> None:
    frames = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(200, 9, 3, 2, 2)
    windows = random_window(frames, 5, torch.Generator().manual_seed(0))[:, :, 0, 0, 0]
    assert (windows.diff(dim=1) == 1).all()
    assert windows[:, 0].unique().tolist() == [0, 1, 2, 3, 4]


def test_codecs_that_cannot_hold_the_code_are_refused() -> None:
    for config in (
        replace(CODEC, encoder_blocks=1),
        replace(CODEC, spatial_strides=(2,)),
        replace(CODEC, encoder_widths=(32, 48)),
        replace(CODEC, decoder_widths=(32, 48)),
        replace(CODEC, latent_channels=49),
    ):
        with pytest.raises(ValueError, match="linear code"):
            fit_linear_code(clips(2, seed=0), config)
