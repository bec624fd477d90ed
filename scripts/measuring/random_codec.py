"""A codec of the published sizes with random weights, for measurements that need no files."""

from __future__ import annotations

from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig
from model.transformer import PRESETS
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from pipeline.config import CodecKind, PipelineConfig


def random_codec(config: PipelineConfig) -> WanAutoencoder | TinyVAE:
    """Return the network of the codec. Its latents have the channels of the generator's preset."""
    channels = PRESETS[config.generator.preset].in_dim
    if config.codec.kind is CodecKind.wan:
        statistics = {"latents_mean": (0.0,) * channels, "latents_std": (1.0,) * channels}
        return WanAutoencoder(WanVAEConfig(z_dim=channels, **statistics))
    return TinyVAE(TinyVAEConfig(latent_channels=channels))
