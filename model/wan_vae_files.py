"""Reads the files of the Wan2.1 video autoencoder: the original one, and diffusers' folder."""

from dataclasses import fields
from pathlib import Path

import torch

from model.wan_autoencoder import WAN21_ONLY, WanAutoencoder, WanVAEConfig
from model.weights import CONFIG_FILE, KeyMap, find_part, load_into, load_state_dict, rename_keys
from utils.errors import UserError
from utils.side_files import check_schema, read_json

# Names in Wan2.1_VAE.pth -> names in diffusers' AutoencoderKLWan, which are our names too.
_RESIDUAL: KeyMap = (
    ("residual.0.*", "norm1.*"),
    ("residual.2.*", "conv1.*"),
    ("residual.3.*", "norm2.*"),
    ("residual.6.*", "conv2.*"),
    ("shortcut.*", "conv_shortcut.*"),
)


_UP_BLOCKS = tuple((4 * level + i, level, i) for level in range(4) for i in range(3))  # every fourth one is the step up


WAN_VAE_TO_DIFFUSERS: KeyMap = (
    ("conv1.*", "quant_conv.*"),
    ("conv2.*", "post_quant_conv.*"),
    ("*.conv1.*", "*.conv_in.*"),
    ("*.head.0.*", "*.norm_out.*"),
    ("*.head.2.*", "*.conv_out.*"),
    ("*.middle.1.*.*", "*.mid_block.attentions.0.*.*"),
    *((f"*.middle.{2 * i}.{old}", f"*.mid_block.resnets.{i}.{new}") for i in range(2) for old, new in _RESIDUAL),
    *((f"encoder.downsamples.*.{old}", f"encoder.down_blocks.*.{new}") for old, new in _RESIDUAL),
    ("encoder.downsamples.*.resample.1.*", "encoder.down_blocks.*.resample.1.*"),
    ("encoder.downsamples.*.time_conv.*", "encoder.down_blocks.*.time_conv.*"),
    *(
        (f"decoder.upsamples.{n}.{old}", f"decoder.up_blocks.{level}.resnets.{i}.{new}")
        for n, level, i in _UP_BLOCKS
        for old, new in _RESIDUAL
    ),
    *(
        (f"decoder.upsamples.{4 * level + 3}.{step}.*", f"decoder.up_blocks.{level}.upsamplers.0.{step}.*")
        for level in range(3)
        for step in ("resample.1", "time_conv")
    ),
)


def read_autoencoder(path: str | Path, *, dtype: torch.dtype = torch.float32) -> WanAutoencoder:
    """Read the original Wan2.1_VAE.pth (or .safetensors), a diffusers folder, or the one of a release.

    Raises:
        UserError: the weights are missing, unreadable, or not those of a Wan2.1 autoencoder.
    """
    path = find_part(path, "vae")
    state = load_state_dict(path)
    if (path / CONFIG_FILE).is_file():
        config = _read_config(path / CONFIG_FILE)
    elif "encoder.conv1.weight" in state:
        config = WanVAEConfig(base_dim=len(state["encoder.conv1.weight"]))  # the other sizes are as published
        state = rename_keys(state, WAN_VAE_TO_DIFFUSERS, source=str(path))
    else:
        raise UserError(f"{path}: is not the original Wan2.1 VAE: it has no tensor 'encoder.conv1.weight'")
    with torch.device("meta"):
        network = WanAutoencoder(config)
    load_into(network, state, source=str(path), dtype=dtype)
    return network


def _read_config(file: Path) -> WanVAEConfig:
    """Read the sizes from diffusers' config.json."""
    values = read_json(file, dict)
    for name, value in WAN21_ONLY.items():
        if (found := values.get(name, value)) != value:
            raise UserError(f"{file}: {name}={found} is not {value}: only the Wan2.1 autoencoder is supported")
    own = {field.name: values[field.name] for field in fields(WanVAEConfig) if field.name in values}
    return check_schema(own, WanVAEConfig, f"{file}: not a Wan2.1 autoencoder's")
