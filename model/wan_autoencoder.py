"""The network of the Wan2.1 video autoencoder: its sizes, its memory, and its encoder and decoder.

Legend: F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.tiling import TileConfig, cut
from model.wan_decoder import CausalConv, ChannelNorm, DoublingConv, Memory, WanDecoder, pointwise
from model.wan_encoder import WanEncoder
from model.weights import WEIGHT_FILES, save_folder

# The most bytes of the widest activation in one call. It limits the latents in a call. On a CPU, larger blocks are
# slower, because malloc does not keep them for the next call. On a GPU, large convolutions are faster.
CPU_CALL_BYTES = 2**25


CALL_BYTES = 2**29


WORKING_TENSORS = 8
"""The number of widest activations that exist at once, with the work space of a convolution. Measured."""


WAN21_ONLY = {"attn_scales": [], "dropout": 0.0, "in_channels": 3, "is_residual": False, "out_channels": 3} | {
    "patch_size": None
}
"""Settings of diffusers' AutoencoderKLWan that other autoencoders of the family change."""


MAX_SIZE, MAX_LEVELS = 2**12, 8  # a config.json may come from anybody


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes, with the names of diffusers. The defaults are the published Wan2.1 autoencoder."""

    base_dim: int = 96
    """Channels of the encoder at full size."""
    decoder_base_dim: int | None = None
    """Channels of the decoder at full size; None: the same as in the encoder."""
    z_dim: int = 16
    """Channels of a latent."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Multiples of the base channels, from full size down."""
    num_res_blocks: int = 2
    """Residual blocks at each size; the decoder has one more."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """For each step down in space, whether it also halves the frames."""
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    """Mean of each channel of the network's latents."""
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    """Standard deviation of each channel of the network's latents."""

    def __post_init__(self) -> None:
        sizes = (self.base_dim, self.decoder_base_dim or 1, self.z_dim, self.num_res_blocks, *self.dim_mult)
        if not all(1 <= size <= MAX_SIZE for size in sizes) or len(self.dim_mult) > MAX_LEVELS:
            raise ValueError(
                f"sizes must be from 1 to {MAX_SIZE}, and there may be at most {MAX_LEVELS} levels: {self}"
            )
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.dim_mult) != len(self.temperal_downsample) + 1:
            raise ValueError(f"{self.dim_mult=} must have one entry more than {self.temperal_downsample=}")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std need {self.z_dim=} entries")

    @property
    def spatial_scale(self) -> int:
        """Pixels along a latent's side."""
        return 2 ** len(self.temperal_downsample)

    @property
    def temporal_scale(self) -> int:
        """The pixel frames of each latent after the first."""
        return 2 ** sum(self.temperal_downsample)

    def encoder(self) -> WanEncoder:
        """A new encoder of these sizes."""
        return WanEncoder(
            dim=self.base_dim,
            latent_channels=self.z_dim,
            multipliers=self.dim_mult,
            residual_blocks=self.num_res_blocks,
            downsample_time=self.temperal_downsample,
        )

    def decoder(self) -> WanDecoder:
        """A new decoder of these sizes."""
        return WanDecoder(
            dim=self.decoder_base_dim or self.base_dim,
            latent_channels=self.z_dim,
            multipliers=self.dim_mult,
            residual_blocks=self.num_res_blocks,
            upsample_time=self.temperal_downsample[::-1],
        )

    @torch.no_grad()
    def decode_bytes(
        self,
        height: int,
        width: int,
        latents: int,
        dtype: torch.dtype,
        *,
        device: str = "cuda",
        tiling: TileConfig | None = None,
    ) -> int:
        """Estimate the bytes, without the stored weights, to decode chunks of ``latents`` latents to frames of H x W.

        They are the state of convolutions between calls, activations, and on a CPU the rearranged weights. With tiles,
        a GPU holds the state of one tile at a time, a CPU the state of all.
        """
        scale, tiles = self.spatial_scale, 1
        if tiling is not None:
            tiles = len(cut(height // scale, width // scale, tiling, scale=scale))
            height, width = min(height, tiling.tile), min(width, tiling.tile)
        with torch.device("meta"):
            decoder, memory = self.decoder(), Memory()
            decoder(torch.empty(1, height // scale, width // scale, self.z_dim), memory)
        kept = sum(tensor.numel() for tensor in memory.values()) * dtype.itemsize
        at_once = 1 if tiling else min(latents, self.latents_per_call(height, width, dtype, device))
        work = WORKING_TENSORS * at_once * self._widest_bytes(height, width, dtype)
        if device != "cpu":
            return kept + work
        return tiles * kept + work + sum(4 * p.numel() for p in decoder.parameters()) // 3 * dtype.itemsize

    def latents_per_call(self, height: int, width: int, dtype: torch.dtype, device: str) -> int:
        """Return how many latents of frames of H x W to decode at once on this kind of device."""
        budget = CPU_CALL_BYTES if device == "cpu" else CALL_BYTES
        return max(1, budget // self._widest_bytes(height, width, dtype))

    def _widest_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Return the bytes of the widest activation for the frames of one latent."""
        return self.temporal_scale * height * width * (self.decoder_base_dim or self.base_dim) * dtype.itemsize


class WanAutoencoder(nn.Module):
    """The network between pixels and unnormalised latents. Its state dict is that of diffusers' AutoencoderKLWan."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.encoder()
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = config.decoder()
        self.register_load_state_dict_post_hook(_forget_rearranged)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @torch.inference_mode(False)  # these tensors are used after the caller's mode has ended
    @torch.no_grad()
    def prepare(self, *, winograd: bool, folded: bool, fused: bool) -> None:
        """Lay weights out as convolutions read them, and choose how to compute; see `model.wan_vae.WanVAE`."""
        for module in self.modules():
            if isinstance(module, CausalConv):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
                module.reduce(winograd)
            elif isinstance(module, DoublingConv):
                module.reduce(folded)
            elif isinstance(module, ChannelNorm):
                module.fused = fused

    def encode(self, frames: Tensor, memory: Memory) -> Tensor:
        """Encode frames [F H W 3] to the mean of latents [f h w C]. A stream begins with F = 1."""
        moments = pointwise(self.quant_conv, self.encoder(frames, memory))
        return moments[..., : self.config.z_dim]

    def decode(self, latents: Tensor, memory: Memory) -> Tensor:
        """Decode latents [f h w C] to frames [F H W 3], unclamped. A stream begins with f = 1 (one frame)."""
        return self.decoder(pointwise(self.post_quant_conv, latents), memory)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that `AutoencoderKLWan.from_pretrained` reads."""
        scales = {
            "scale_factor_spatial": self.config.spatial_scale,
            "scale_factor_temporal": self.config.temporal_scale,
        }
        config = {"_class_name": "AutoencoderKLWan", **asdict(self.config), **WAN21_ONLY, **scales}
        save_folder(folder, self, config, name=WEIGHT_FILES[1])


def _forget_rearranged(network: WanAutoencoder, _: object) -> None:
    network.prepare(winograd=False, folded=False, fused=False)
