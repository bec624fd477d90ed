"""The sizes of a TinyVAE: the published ones, or those from a config.json, or those inferred from weights."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from model.weights import CONFIG_FILE, StateDict, layer_numbers
from utils.errors import UserError
from utils.side_files import check_schema, read_json

MAX_SIZE, MAX_STAGES, MAX_BLOCKS = 2**14, 8, 64  # a config.json may come from anybody


@dataclass
class TinyVAEConfig:
    """The sizes of a TinyVAE. The defaults are the published TAEHV for Wan2.1. Stages are counted from the pixels."""

    patch_size: int = 1
    """The side of the pixel squares that are folded into channels before the encoder."""
    latent_channels: int = 16
    """Channels of a latent."""
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    """Width before the first encoder stage, then of each stage."""
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    """Width of each decoder stage, then after the last one."""
    encoder_blocks: int = 3
    """MemBlocks in each encoder stage. With 0 the encoder is linear except for its first ReLU."""
    decoder_blocks: int = 3
    """MemBlocks in each decoder stage."""
    spatial_strides: tuple[int, ...] = (2, 2, 2)
    """Spatial reduction of each encoder stage. The decoder reverses them in the opposite order."""
    temporal_strides: tuple[int, ...] = (2, 2, 1)
    """Temporal reduction of each encoder stage. The decoder reverses them in the opposite order."""
    latent_limit: float = 3.0
    """The decoder limits latents smoothly to (-latent_limit, latent_limit)."""
    first_frame_alone: bool = False
    """True: copies of the first frame are put before the clip, so latent 0 codes only frame 0, as in the Wan VAE.
    False: the published way. The last frame is repeated to fill the last latent."""

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths", "spatial_strides", "temporal_strides"):
            setattr(self, name, tuple(getattr(self, name)))
        stages = len(self.spatial_strides)
        if len(self.temporal_strides) != stages:
            raise ValueError(f"{self.temporal_strides=} and {self.spatial_strides=} differ in their number of stages")
        for name in ("encoder_widths", "decoder_widths"):
            if len(getattr(self, name)) != stages + 1:
                raise ValueError(f"{name}={getattr(self, name)} needs {stages + 1} entries for {stages} stages")
        sizes = (self.patch_size, self.latent_channels, *self.encoder_widths, *self.decoder_widths)
        if min(*sizes, *self.spatial_strides, *self.temporal_strides) < 1:
            raise ValueError(f"sizes and strides must be positive: {self}")
        if max(*sizes, *self.spatial_strides, *self.temporal_strides) > MAX_SIZE or stages > MAX_STAGES:
            raise ValueError(f"sizes above {MAX_SIZE} or more than {MAX_STAGES} stages: {self}")
        if max(self.encoder_blocks, self.decoder_blocks) > MAX_BLOCKS:
            raise ValueError(f"{self.encoder_blocks=} and {self.decoder_blocks=} must be at most {MAX_BLOCKS}")
        if not 0 < self.latent_limit < math.inf:
            raise ValueError(f"{self.latent_limit=} must be positive")
        if min(self.encoder_blocks, self.decoder_blocks) < 0:
            raise ValueError(f"{self.encoder_blocks=} and {self.decoder_blocks=} must not be negative")

    @property
    def spatial_scale(self) -> int:
        """Pixels along a latent's side."""
        return self.patch_size * math.prod(self.spatial_strides)

    @property
    def temporal_scale(self) -> int:
        """The pixel frames of each latent after the first."""
        return math.prod(self.temporal_strides)

    def decode_bytes(self, height: int, width: int, latents: int, dtype: torch.dtype) -> int:
        """Estimate the bytes, without the weights, to decode chunks of ``latents`` latents to frames of H x W."""
        area = height * width // self.spatial_scale**2
        kept = peak = 0
        strides = zip(reversed(self.spatial_strides), reversed(self.temporal_strides), strict=True)
        for index, (scale, stride) in enumerate(strides):
            inner, outer = self.decoder_widths[index : index + 2]
            if self.decoder_blocks:
                kept += self.decoder_blocks * inner * area
                peak = max(peak, 6 * inner * area * latents)  # of a MemBlock: input, past, both joined, and two results
            grown = stride * inner * area * latents
            area, latents = area * scale**2, latents * stride
            peak = max(peak, grown + (inner + outer) * area * latents)
        return (kept + peak) * dtype.itemsize


SHAPES = TinyVAEConfig(
    patch_size=4,
    latent_channels=48,
    encoder_widths=(48, 48),
    decoder_widths=(112, 64),
    encoder_blocks=0,
    decoder_blocks=2,
    spatial_strides=(1,),
    temporal_strides=(4,),
    latent_limit=12.0,
    first_frame_alone=True,
)
TINY_VAE_PRESETS: dict[str, TinyVAEConfig] = {"taew2.1": TinyVAEConfig(), "shapes": SHAPES}


def read_tiny_config(folder: str | Path) -> TinyVAEConfig:
    """Read the sizes from the config.json of a TinyVAE's folder.

    Raises:
        UserError: the file is missing, has unknown keys, or its values do not describe a TinyVAE.
    """
    file = Path(folder) / CONFIG_FILE
    values = read_json(file, dict)
    if unknown := set(values) - {field.name for field in fields(TinyVAEConfig)}:
        raise UserError(
            f"{folder}: its config.json does not describe a TinyVAE: the keys {sorted(unknown)} are unknown"
        )
    return check_schema(values, TinyVAEConfig, f"{file}: does not describe a TinyVAE")


def infer_tiny_config(state: StateDict, source: str) -> TinyVAEConfig:
    """Infer the sizes from tensor shapes. Shapes do not show `spatial_strides`, so the published 2 is assumed."""

    def shapes(part: str, suffix: str) -> list[torch.Size]:
        names = (f"{part}.{index}.{suffix}" for index in layer_numbers(state, part))
        return [state[name].shape for name in names if name in state]

    encoder, decoder, pools = shapes("encoder", "weight"), shapes("decoder", "weight"), shapes("encoder", "conv.weight")
    if (
        len(encoder) < 2
        or len(decoder) < 2
        or not pools
        or encoder[0][1] % 3
        or any(len(shape) != 4 for shape in (*encoder, *decoder, *pools))
    ):
        raise UserError(f"{source}: is not a TAEHV: its tensors have other names or shapes; use another file")
    stages = len(pools)
    return TinyVAEConfig(
        patch_size=math.isqrt(encoder[0][1] // 3),
        latent_channels=encoder[-1][0],
        encoder_widths=tuple(shape[0] for shape in encoder[:-1]),
        decoder_widths=tuple(shape[0] for shape in decoder[:-1]),
        encoder_blocks=len(shapes("encoder", "conv.0.weight")) // stages,
        decoder_blocks=len(shapes("decoder", "conv.0.weight")) // stages,
        spatial_strides=(2,) * stages,
        temporal_strides=tuple(shape[1] // shape[0] for shape in pools),
    )
