"""WanVAE: the Wan2.1 video autoencoder as a `VideoCodec` that encodes and decodes streams, whole or in tiles.

Latents are normalised by the published mean and standard deviation of each channel, as the denoiser sees them.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from model.tiling import TileConfig, TiledDecoder, cut, decode_tiles
from model.wan_decoder import CausalConv, DoublingConv, Memory, WanDecoder, pointwise
from model.wan_encoder import WanEncoder
from model.weights import (
    WEIGHT_FILES,
    KeyMap,
    find_part,
    load_into,
    load_state_dict,
    read_config,
    rename_keys,
    save_folder,
)
from utils.errors import UserError

# What one call may hold of its widest activation: as many latents go in as fit. On a CPU, more than malloc keeps for
# the next call is slower; a GPU wants large convolutions.
CPU_CALL_BYTES = 2**25
CALL_BYTES = 2**29
WORKING_TENSORS = 8
"""Activations of the widest size that are alive at once, work space of a convolution included; as measured."""

WAN21_ONLY = {"attn_scales": [], "dropout": 0.0, "in_channels": 3, "is_residual": False, "out_channels": 3} | {
    "patch_size": None
}
"""Settings of diffusers' AutoencoderKLWan that other autoencoders of the family change."""

# Wan2.1_VAE.pth -> diffusers' AutoencoderKLWan, with which our names agree.
_RESIDUAL: KeyMap = (
    ("residual.0.*", "norm1.*"),
    ("residual.2.*", "conv1.*"),
    ("residual.3.*", "norm2.*"),
    ("residual.6.*", "conv2.*"),
    ("shortcut.*", "conv_shortcut.*"),
)
_UP_BLOCKS = tuple((4 * level + i, level, i) for level in range(4) for i in range(3))  # each fourth one is the step up
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


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes, by diffusers' names; the defaults are the published Wan2.1 autoencoder."""

    base_dim: int = 96
    """Channels at full size, of the encoder."""
    decoder_base_dim: int | None = None
    """Channels at full size, of the decoder; None for the encoder's."""
    z_dim: int = 16
    """Channels of a latent."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Multiples of the base channels, from full size down."""
    num_res_blocks: int = 2
    """Residual blocks at each size; the decoder has one more."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """For each step down in space, whether it halves the frames too."""
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
        """Frames of a latent after the first."""
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
        """Estimate of what decoding chunks of so many latents to frames of H x W takes beside the stored weights.

        That is what convolutions keep between calls, activations, and on a CPU the rearranged weights. In tiles, a GPU
        holds the state of one at a time, a CPU that of all.
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
        """Latents of frames of H x W to decode at once on this kind of device."""
        budget = CPU_CALL_BYTES if device == "cpu" else CALL_BYTES
        return max(1, budget // self._widest_bytes(height, width, dtype))

    def _widest_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Of the widest activation of one latent's frames."""
        return self.temporal_scale * height * width * (self.decoder_base_dim or self.base_dim) * dtype.itemsize


class WanAutoencoder(nn.Module):
    """The network between pixels and unnormalised latents; its state is that of diffusers' AutoencoderKLWan."""

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
        """Of the weights."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    @torch.no_grad()
    def prepare(self, *, reduced: bool) -> None:
        """Lay weights out as convolutions read them; `reduced` also rearranges them so that those multiply less."""
        for module in self.modules():
            if isinstance(module, CausalConv):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
            if isinstance(module, (CausalConv, DoublingConv)):
                module.reduce(reduced)

    def encode(self, frames: Tensor, memory: Memory) -> Tensor:
        """Frames [F H W 3] -> the mean of latents [f h w C]; a stream begins with F = 1."""
        moments = pointwise(self.quant_conv, self.encoder(frames, memory))
        return moments[..., : self.config.z_dim]

    def decode(self, latents: Tensor, memory: Memory) -> Tensor:
        """Latents [f h w C] -> frames [F H W 3], unclamped; a stream begins with f = 1, which gives one frame."""
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
    network.prepare(reduced=False)


class WanVAE(nn.Module):
    """A `VideoCodec`; 8x smaller in space, and 4x in time after the first frame.

    Attributes:
        tiling: cut frames into tiles to decode them; None decodes them whole.
        reduced: convolve with fewer products, from rearranged weights; None does so on a CPU, where it is known to be
            faster.
    """

    def __init__(self, vae: WanAutoencoder) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels = vae.config.z_dim
        self.spatial_scale = vae.config.spatial_scale
        self.temporal_scale = vae.config.temporal_scale
        self.tiling: TileConfig | None = None
        self.reduced: bool | None = None

    @classmethod
    def from_file(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> "WanVAE":
        """Load the original Wan2.1_VAE.pth (or .safetensors), a diffusers folder, or a release's; nothing is fetched.

        Raises:
            UserError: the weights are missing, unreadable, or not those of a Wan2.1 autoencoder.
        """
        path = find_part(path, "vae")
        state = load_state_dict(path)
        if path.is_dir():
            config = _read_config(path)
        elif "encoder.conv1.weight" in state:
            config = WanVAEConfig(base_dim=len(state["encoder.conv1.weight"]))  # the rest is as published
            state = rename_keys(state, WAN_VAE_TO_DIFFUSERS, source=str(path))
        else:
            raise UserError(f"{path}: is not the original Wan2.1 VAE: it has no tensor 'encoder.conv1.weight'")
        with torch.device("meta"):
            network = WanAutoencoder(config)
        load_into(network, state, source=str(path), dtype=dtype)
        return cls(network)

    def num_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` decode to: the first latent gives 1, each later one `temporal_scale`."""
        return 1 + (latent_frames - 1) * self.temporal_scale

    def num_latents(self, frames: int) -> int:
        """Latent frames that `frames` pixel frames encode to.

        Raises:
            ValueError: `frames` is not 1 plus a multiple of `temporal_scale`.
        """
        if frames < 1 or (frames - 1) % self.temporal_scale:
            raise ValueError(f"frames={frames} is not 1 plus a multiple of temporal_scale={self.temporal_scale}")
        return 1 + (frames - 1) // self.temporal_scale

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> normalised latents [B f C h w], the posterior's mode; F = 1 is an image.

        Raises:
            ValueError: H or W is not a multiple of `spatial_scale`, or F is not 1 plus a multiple of `temporal_scale`.
        """
        return self.streaming_encoder().encode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B f C h w] -> frames [B F 3 H W] in [-1, 1] with F = num_frames(f).

        With `tiling`, one tile after the other is decoded through all of time, so no tile's state is kept.
        """
        if self.tiling is None:
            return self.streaming_decoder().decode(latents)
        self._prepare()
        scale = self.spatial_scale
        tiles = cut(*latents.shape[-2:], self.tiling, scale=scale)
        return decode_tiles(tiles, latents, lambda _, part: self._tile_decoder().decode(part), scale=scale)

    def streaming_encoder(self) -> "StreamingWanEncoder":
        """An encoder with its own state, for one stream of frames."""
        self._prepare()
        return StreamingWanEncoder(self)

    def streaming_decoder(self) -> "StreamingWanDecoder | TiledDecoder":
        """A decoder with its own state, for one stream of latents."""
        self._prepare()
        if self.tiling is None:
            return StreamingWanDecoder(self)
        return TiledDecoder(self._tile_decoder, self.tiling, scale=self.spatial_scale)

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """See `WanVAEConfig.decode_bytes`; for the weights, device and tiling at hand."""
        network = self.vae
        return network.config.decode_bytes(
            height, width, latents, network.dtype, device=network.device.type, tiling=self.tiling
        )

    def _tile_decoder(self) -> "StreamingWanDecoder":
        return StreamingWanDecoder(self, latents_per_call=1)

    def _prepare(self) -> None:
        self.vae.prepare(reduced=self.vae.device.type == "cpu" if self.reduced is None else self.reduced)


class _Stream:
    """What both directions share: a memory for each clip, and calls of a few latents each."""

    def __init__(self, codec: WanVAE) -> None:
        self._codec = codec
        config, device = codec.vae.config, codec.vae.device
        self._mean = torch.tensor(config.latents_mean, device=device)  # float32, whatever the weights are
        self._std = torch.tensor(config.latents_std, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._memories: list[Memory] = []

    def move_state(self, device: torch.device | str) -> None:
        """Bring what is kept of the stream to `device`."""
        self._memories = [{name: kept.to(device) for name, kept in memory.items()} for memory in self._memories]

    def _run(self, network: Callable[[Tensor, Memory], Tensor], clips: Tensor, frames_per_call: int) -> Tensor:
        """Clips [B T H W C] through `network`; a stream begins with one frame alone."""
        self._memories = self._memories or [{} for _ in clips]
        if len(clips) != len(self._memories):
            raise ValueError(f"a chunk of {len(clips)} clips does not continue a stream of {len(self._memories)}")
        results = []
        for clip, memory in zip(clips.to(self._codec.vae.dtype), self._memories, strict=True):
            alone = 0 if memory else 1
            pieces = [clip[:alone], *clip[alone:].split(frames_per_call)]
            results.append(torch.cat([network(piece, memory) for piece in pieces if len(piece)]))
        return torch.stack(results)


class StreamingWanDecoder(_Stream):
    """A `StreamingDecoder`: each causal convolution keeps its last two frames, so memory does not grow."""

    def __init__(self, codec: WanVAE, *, latents_per_call: int | None = None) -> None:
        """None: as many as suit the size of the frames."""
        super().__init__(codec)
        self._latents_per_call = latents_per_call

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        codec = self._codec
        if latents.ndim != 5 or latents.shape[2] != codec.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)} are not [B f {codec.latent_channels} h w]")
        height, width = (size * codec.spatial_scale for size in latents.shape[-2:])
        suitable = codec.vae.config.latents_per_call(height, width, codec.vae.dtype, latents.device.type)
        latents = rearrange(latents, "b f c h w -> b f h w c") * self._std + self._mean
        frames = self._run(codec.vae.decode, latents, self._latents_per_call or suitable)
        return rearrange(frames.clamp_(-1, 1), "b f h w c -> b f c h w")


class StreamingWanEncoder(_Stream):
    """Encodes one endless stream of frames chunk after chunk; the chunks joined equal one full encode."""

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next chunk: frames [B F 3 H W] in [-1, 1] -> latents [B f C h w].

        Raises:
            ValueError: H or W is not a multiple of `spatial_scale`, or F not one of `temporal_scale` (plus 1 in the
                first chunk).
        """
        codec = self._codec
        if frames.ndim != 5 or frames.shape[2] != 3 or any(size % codec.spatial_scale for size in frames.shape[-2:]):
            shape = tuple(frames.shape)
            raise ValueError(f"frames {shape} are not [B F 3 H W] with sides a multiple of {codec.spatial_scale}")
        if not self._memories:
            codec.num_latents(frames.shape[1])
        elif frames.shape[1] == 0 or frames.shape[1] % codec.temporal_scale:
            raise ValueError(
                f"a chunk of {frames.shape[1]} frames does not fill whole latents of {codec.temporal_scale} frames"
            )
        step = codec.vae.config.latents_per_call(*frames.shape[-2:], codec.vae.dtype, frames.device.type)
        frames = rearrange(frames, "b f c h w -> b f h w c")
        latents = self._run(codec.vae.encode, frames, step * codec.temporal_scale)
        return rearrange((latents - self._mean) / self._std, "b f h w c -> b f c h w")


def _read_config(folder: Path) -> WanVAEConfig:
    """The sizes in a diffusers folder's config.json."""
    values = read_config(folder)
    for name, value in WAN21_ONLY.items():
        if (found := values.get(name, value)) != value:
            raise UserError(f"{folder}: {name}={found} is not {value}: only the Wan2.1 autoencoder is supported")
    try:
        return WanVAEConfig(
            **{field.name: values[field.name] for field in fields(WanVAEConfig) if field.name in values}
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: config.json is not a Wan2.1 autoencoder's: {error}") from error
