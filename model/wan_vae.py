"""WanVAE: the Wan2.1 video autoencoder as a `VideoCodec` that encodes and decodes streams, whole or in tiles.

Latents are normalised by the published mean and standard deviation of each channel, as the denoiser sees them.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from model.tiling import TileConfig, TiledDecoder, cut, decode_tiles
from model.wan_autoencoder import WanAutoencoder
from model.wan_decoder import Memory
from model.wan_vae_files import read_autoencoder


class WanVAE(nn.Module):
    """A `VideoCodec`. Latents are 8x smaller in space, and 4x in time after the first frame.

    Attributes:
        tiling: cut frames into tiles to decode them; None decodes them whole.
        winograd: convolve over time with a third fewer products, from rearranged weights; None does so on a CPU only,
            because no GPU has measured it.
        folded: upsample in the convolution that follows, with less than half of its products; None does so on a CPU.
        fused: compute norms, SiLU, biases and shortcuts with the operators of `model.fused_ops`.
    """

    def __init__(self, vae: WanAutoencoder, *, tiling: TileConfig | None = None) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels = vae.config.z_dim
        self.spatial_scale = vae.config.spatial_scale
        self.temporal_scale = vae.config.temporal_scale
        self.tiling = tiling
        self.winograd: bool | None = None
        self.folded: bool | None = None
        self.fused = False

    @classmethod
    def from_file(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, tiling: TileConfig | None = None
    ) -> "WanVAE":
        """Load the original Wan2.1_VAE.pth (or .safetensors), a diffusers folder, or a release's; nothing is fetched.

        Raises:
            UserError: the weights are missing, unreadable, or not those of a Wan2.1 autoencoder.
        """
        return cls(read_autoencoder(path, dtype=dtype), tiling=tiling)

    def compute_with(
        self, *, winograd: bool | None = None, folded: bool | None = None, fused: bool | None = None
    ) -> None:
        """Choose how to compute; see the attributes of these names. None leaves a choice as it is."""
        self.winograd = self.winograd if winograd is None else winograd
        self.folded = self.folded if folded is None else folded
        self.fused = self.fused if fused is None else fused

    def num_frames(self, latent_frames: int) -> int:
        """Return how many frames latents decode to: the first latent gives 1, each later one `temporal_scale`."""
        return 1 + (latent_frames - 1) * self.temporal_scale

    def num_latents(self, frames: int) -> int:
        """Return how many latent frames `frames` pixel frames encode to.

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

        With `tiling`, each tile is decoded over the whole clip before the next one, so no state of a tile is stored.
        """
        if self.tiling is None:
            return self.streaming_decoder().decode(latents)
        self._prepare()
        scale = self.spatial_scale
        tiles = cut(*latents.shape[-2:], self.tiling, scale=scale)
        return decode_tiles(tiles, latents, lambda _, part: self._tile_decoder().decode(part), scale=scale)

    def streaming_encoder(self) -> "StreamingWanEncoder":
        """Make an encoder with its own state, for one stream of frames."""
        self._prepare()
        return StreamingWanEncoder(self)

    def streaming_decoder(self) -> "StreamingWanDecoder | TiledDecoder":
        """Make a decoder with its own state, for one stream of latents."""
        self._prepare()
        if self.tiling is None:
            return StreamingWanDecoder(self)
        return TiledDecoder(self._tile_decoder, self.tiling, scale=self.spatial_scale)

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """See `WanVAEConfig.decode_bytes`. It uses the present weights, device and tiling."""
        network = self.vae
        return network.config.decode_bytes(
            height, width, latents, network.dtype, device=network.device.type, tiling=self.tiling
        )

    def _tile_decoder(self) -> "StreamingWanDecoder":
        return StreamingWanDecoder(self, latents_per_call=1)

    def _prepare(self) -> None:
        on_cpu = self.vae.device.type == "cpu"
        winograd, folded = (on_cpu if choice is None else choice for choice in (self.winograd, self.folded))
        self.vae.prepare(winograd=winograd, folded=folded, fused=self.fused)


class _Stream:
    """The common part of both directions: a memory for each clip, and calls of a few latents each."""

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
        """Move the state of the stream to `device`."""
        self._memories = [{name: kept.to(device) for name, kept in memory.items()} for memory in self._memories]

    def _run(self, network: Callable[[Tensor, Memory], Tensor], clips: Tensor, frames_per_call: int) -> Tensor:
        """Run clips [B T H W C] through `network`. The first call of a stream has one frame."""
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
    """A `StreamingDecoder`. Each causal convolution keeps its last two frames, so memory does not grow."""

    def __init__(self, codec: WanVAE, *, latents_per_call: int | None = None) -> None:
        """`latents_per_call` latents are decoded at once. None chooses the number from the size of the frames."""
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
    """Encodes one endless stream of frames, chunk by chunk. The joined chunks equal one full encode."""

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
