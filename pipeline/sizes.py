"""Reads sizes before any weight is loaded, from the configurations beside the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from model.tiny_vae_config import TinyVAEConfig, read_tiny_config
from model.transformer import PRESETS, WanConfig
from model.weights.transformer_config import read_declared_config
from pipeline.config import CodecConfig, CodecKind, PipelineConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from model.tiny_vae_config import TinyVAEConfig


def transformer_config(path: Path | None, preset: str) -> WanConfig:
    """Return the sizes known before weights are loaded: those of their config.json, else the preset."""
    declared = None if path is None else read_declared_config(path)
    if declared is None:
        return PRESETS[preset]
    try:
        return WanConfig(**(asdict(PRESETS[preset]) | declared))
    except ValueError as error:
        raise UserError(f"{path}: config.json: {error}") from error


def codec_sizes(config: CodecConfig) -> TinyVAEConfig:
    """Return the sizes of a TinyVAE. For the Wan VAE, those that it shares with the published TAEHV."""
    path = Path(config.weights)
    return read_tiny_config(path) if config.kind is CodecKind.tiny and path.is_dir() else TinyVAEConfig()


def token_size(config: PipelineConfig) -> tuple[int, int]:
    """Return the pixel rows and columns of a token, from the configurations beside the weights."""
    sizes = codec_sizes(config.codec)
    scale = sizes.spatial_scale
    generator = Path(config.generator.weights) if config.generator.weights else None
    _, rows, columns = transformer_config(generator, config.generator.preset).patch_size
    return scale * rows, scale * columns
