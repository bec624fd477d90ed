"""A Shapes world of 16x16 pixels with models that train in seconds. Every objective must improve a student in it.

A test module uses it with ``pytest_plugins = ["tests.small_world"]`` and the fixture ``world``.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from model.kv_cache import KVCache
from model.text_encoder import TextEncoderConfig, build_text_encoder
from model.transformer import WanConfig, WanTransformer
from model.weights import load_state_dict, save_folder
from pipeline.loading import load_codec, load_denoiser
from pipeline.rollout import rollout
from pipeline.sampling import sample
from scripts import cache_embeddings
from tests.made_once import made_once
from tests.shapes_parts import REPOSITORY, SMALL_CODEC, tiny_codec
from trainer.config import Config
from trainer.stored_data import StoredEmbeddings
from utils.config import load_config
from utils.shapes import ShapesConfig, all_scenes, render_clips, training_scenes

SIZES = WanConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=1, text_dim=16, text_len=16, freq_dim=32, prediction_type="x0"
)
SHAPES_CONFIGS = REPOSITORY / "configs" / "shapes"
CACHED = ("data.embeddings={folder}/embeddings", "diffusion.train_text_encoder=false")
WORLD = ShapesConfig(resolution=16, speed=1.0)
MEASURED = training_scenes()[::20]
OVERRIDES = (
    "codec.weights={folder}/codec",
    "text_encoder.weights={folder}/text_encoder",
    "data.sample_prompts={folder}/samples.txt",
    "data.shapes.resolution=16",
    "data.shapes.speed=1.0",
    "video.height=16",
    "video.width=16",
    "video.num_frames=6",
    "video.scale=1",
    "trainer.batch_size=8",
    "rollout.denoising_steps=[1000,500]",
    "trainer.ema_decay=0.8",
    "trainer.log_every=1000",
    "trainer.export_dtype=float32",
    "optimizer.warmup_steps=0",
    "optimizer.decay_fraction=0.5",
    "device=cpu",
)


@dataclass(frozen=True)
class World:
    """A folder with codec, text_encoder, embeddings, teacher and student (the teacher with noise added)."""

    folder: Path

    def overrides(self, *more: str) -> list[str]:
        """Return the overrides for a configuration of configs/shapes."""
        return [text.format(folder=self.folder) for text in (*OVERRIDES, *more)]

    def config(self, *more: str) -> Config:
        """Return the configuration that generates videos."""
        return load_config(Config, SHAPES_CONFIGS / "base.yaml", self.overrides(*more))

    def train(self, name: str, logdir: Path, *more: str) -> Path:
        """Run train.py on configs/shapes/NAME.yaml. Return the folder of the generator."""
        arguments = ["--config_path", str(SHAPES_CONFIGS / f"{name}.yaml"), "--logdir", str(logdir)]
        assert train.main([*arguments, "--no_save", "--no_visualize", *self.overrides(*more)]) == 0
        return logdir / "model" / "generator"

    @torch.no_grad()
    def colour_error(self, generator: str | Path, *, bidirectional: bool = False) -> float:
        """Return the mean squared error of the mean colours of generated clips, compared with those of the prompts."""
        config = self.config(f"generator.weights={generator}")
        denoiser, codec = load_denoiser(config.generator), load_codec(config.codec)
        text = StoredEmbeddings(self.folder / "embeddings")
        embeds = text.encode([scene.prompt for scene in MEASURED])
        shape = (len(MEASURED), *config.video.latent_shape(codec))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if bidirectional:
            latents = sample(denoiser, noise, embeds, text.encode([""] * len(MEASURED)), config.sampling)
        else:
            drawn = torch.Generator().manual_seed(1)
            blocks = rollout(denoiser, noise, embeds, KVCache(SIZES.num_layers), config.rollout, generator=drawn)
            latents = torch.cat([block.latents for block in blocks], dim=1)
        real = render_clips(MEASURED, codec.num_frames(6), torch.Generator().manual_seed(2), WORLD)
        return (mean_colour(codec.decode(latents)) - mean_colour(real)).square().mean().item()


def mean_colour(frames: Tensor) -> Tensor:
    """Return the mean colour [B 3] of frames [B F 3 H W]."""
    return frames.mean(dim=(1, 3, 4))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give the world with a trained teacher. Tests may only read it."""
    return World(made_once(tmp_path_factory, "world", write_world))


def write_world(folder: Path) -> None:
    """Write every part of a :class:`World`, and train its teacher."""
    world = World(folder)
    tiny_codec(SMALL_CODEC).save_pretrained(folder / "codec")
    encoder = TextEncoderConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32)
    build_text_encoder([scene.prompt for scene in all_scenes()], encoder).save_pretrained(folder / "text_encoder")
    (folder / "samples.txt").write_text(f"{MEASURED[0].prompt}\n")
    flags = ["--config_path", str(SHAPES_CONFIGS / "base.yaml")]
    assert cache_embeddings.main([*flags, *world.overrides("data.embeddings={folder}/embeddings")]) == 0
    shutil.rmtree(folder / "text_encoder")  # so trainings must find every embedding in the cache
    fresh = WanTransformer(SIZES)
    fresh.reset_parameters(torch.Generator().manual_seed(0))
    save_folder(folder / "fresh", fresh, asdict(SIZES))
    teaching = ["trainer.steps=150", "trainer.batch_size=16", "optimizer.lr=5e-3", "generator.weights={folder}/fresh"]
    shutil.copytree(world.train("teacher", folder / "run", *teaching, *CACHED), folder / "teacher")
    save_folder(folder / "student", disturbed(load_state_dict(folder / "teacher"), 0.7), asdict(SIZES))


def disturbed(state: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return a state dict with noise added to its matrices: `share` of their own standard deviation."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + share * value.std() * torch.randn(value.shape, generator=generator) if value.ndim > 1 else value
        for name, value in state.items()
    }
