"""The codec's training on latents that a generator has denoised."""

from dataclasses import asdict, replace

import pytest
import torch

from model.transformer import WanTransformer
from model.weights import save_folder
from tests.shapes_parts import SIZES
from trainer.autoencoder import AutoencoderTrainer
from trainer.build import build_trainer
from trainer.objectives.codec import psnr
from trainer.trainer import RunContext
from utils.distributed import Ranks
from utils.errors import UserError
from utils.tracking import Tracker

pytest_plugins = ["tests.shapes_parts"]
DENOISED = ("objective=autoencoder", "autoencoder.crop_frames=null", "autoencoder.denoised_share=1")


@pytest.fixture
def build(release, tmp_path):
    """Give a function that builds the trainer of the release's codec with overrides."""

    def build(*overrides: str) -> AutoencoderTrainer:
        context = RunContext(tmp_path, torch.device("cpu"), Ranks(), Tracker(tmp_path, config={}, is_main=False))
        given = f"autoencoder.weights={release.folder / 'codec'}", "trainer.steps=40", "optimizer.lr=1e-2"
        return build_trainer(release.config(*DENOISED, *given, *overrides), context)

    return build


@torch.no_grad()
def quality(trainer: AutoencoderTrainer) -> float:
    """The PSNR in dB of clips whose latents the generator has denoised."""
    samples = trainer.data.read(range(1000, 1008))
    exact = trainer.codec.encode(samples.frames)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(5))
    return psnr(trainer.codec.decode(trainer.last_pass(exact, samples.prompts, noise)), samples.frames).item()


def test_the_decoder_learns_to_mend_the_generators_errors_and_the_rest_stays(build):
    trainer = build()
    parts = trainer.codec.encoder, trainer.last_pass.generator
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    first = quality(trainer)
    for _ in range(40):
        trainer.train_step()
    assert quality(trainer) > first + 0.5
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())


def test_without_a_share_no_generator_is_loaded(build):
    trainer = build("autoencoder.denoised_share=0", "generator.weights=/nowhere")
    assert trainer.last_pass is None and trainer.train_step()


def test_what_cannot_be_used_is_refused(build, tmp_path):
    other = replace(SIZES, in_dim=8, out_dim=8)
    save_folder(tmp_path / "other", WanTransformer(other), asdict(other))
    with pytest.raises(UserError, match=r"denoised_share=1\.0 needs whole clips: set crop_frames=null"):
        build("autoencoder.crop_frames=9")
    with pytest.raises(UserError, match="has latents of 8 channels, but the codec of 48: name the codec"):
        build(f"generator.weights={tmp_path / 'other'}")
