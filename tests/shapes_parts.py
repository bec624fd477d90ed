"""A complete tiny release in the real formats: weights, configuration, prompts. It is made once for a test run.

A test module uses it with ``pytest_plugins = ["tests.shapes_parts"]`` and the fixture ``release``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from model.text_encoder import TextEncoderConfig, build_text_encoder
from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TINY_VAE_PRESETS, TinyVAEConfig
from model.transformer import PRESETS, WanConfig, WanTransformer
from model.weights import save_folder
from tests.made_once import made_once
from trainer.config import Config
from trainer.objectives.codec import fit_linear_code
from utils.config import load_config
from utils.shapes import all_scenes, render_clips, training_scenes

REPOSITORY = Path(__file__).resolve().parents[1]
CODEC = replace(TINY_VAE_PRESETS["shapes"], decoder_widths=(97, 48), decoder_blocks=1)
SMALL_CODEC = replace(CODEC, latent_channels=16, encoder_widths=(48, 16))
"""For models with the channels of Wan, and for trainings whose thirty steps have to show an effect."""
SIZES = replace(PRESETS["shapes"], dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, freq_dim=32)
PROMPTS = ["a large red circle on a navy background", "a small blue square on a black background", "a cat / a dog 🐈"]
CONFIG = """\
defaults: [{base}]
generator: {{weights: {folder}/generator}}
student: {{weights: {folder}/student, shift: 5.0}}
real_score: {{weights: {folder}/teacher}}
codec: {{weights: {folder}/codec}}
text_encoder: {{weights: {folder}/text_encoder, cache: null}}
video: {{num_frames: 6, scale: 2}}
sampling: {{steps: 2}}
data: {{sample_prompts: {folder}/samples.txt}}
inference: {{data_path: {folder}/prompts.txt, output_folder: {folder}/videos}}
autoencoder: {{fit_clips: 8}}
ode: {{pairs: {folder}/pairs}}
dmd: {{critic_updates: 2}}
trainer: {{steps: 3, batch_size: 2, log_every: 1}}
optimizer: {{lr: 1.0e-3}}
critic_optimizer: {{lr: 1.0e-3}}
device: cpu
"""


@dataclass(frozen=True)
class Release:
    """A folder with generator, student, teacher, codec, text_encoder, prompts.txt, samples.txt and config.yaml."""

    folder: Path

    @property
    def config_path(self) -> str:
        return str(self.folder / "config.yaml")

    @property
    def prompts(self) -> list[str]:
        return list(PROMPTS)

    def config(self, *overrides: str) -> Config:
        return load_config(Config, self.config_path, overrides)


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Give the release. Tests may only read it."""
    return Release(made_once(tmp_path_factory, "release", write_release))


def write_release(folder: Path) -> None:
    """Write every file of a :class:`Release`."""
    for seed, name in enumerate(("generator", "student", "teacher")):
        save_folder(folder / name, tiny_transformer(seed), asdict(SIZES))
    tiny_codec().save_pretrained(folder / "codec")
    vocabulary = [scene.prompt for scene in all_scenes()]
    build_text_encoder(vocabulary, TextEncoderConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32)).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (folder / "samples.txt").write_text("\n".join(vocabulary[:2]) + "\n", encoding="utf-8")
    base = REPOSITORY / "configs" / "shapes" / "base.yaml"
    (folder / "config.yaml").write_text(CONFIG.format(base=base, folder=folder), encoding="utf-8")


def tiny_transformer(seed: int, sizes: WanConfig = SIZES) -> WanTransformer:
    """Return a transformer whose output depends on every input. (The head of a new model is zero.)"""
    generator = torch.Generator().manual_seed(seed)
    model = WanTransformer(sizes)
    model.reset_parameters(generator)
    for name, parameter in model.named_parameters():
        if name.startswith(("head.head", "text_embedding", "time_embedding")):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def tiny_codec(config: TinyVAEConfig = CODEC) -> TinyVAE:
    """Return a small Shapes codec before its training: a linear code, whose frames show the content of a clip."""
    codec = TinyVAE(config)
    scenes = training_scenes()[::30]
    clips = render_clips(scenes, 5, torch.Generator().manual_seed(0))
    fit_linear_code(clips, codec.config).write_to(codec)
    return codec
