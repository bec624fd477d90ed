"""WanVAE: the Wan2.1 video autoencoder (diffusers' AutoencoderKLWan) as a `VideoCodec` with streaming decode.

Latents are normalised by the published mean and standard deviation of each channel, as the denoiser sees them.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from model.weights import find_part, load_into, load_state_dict, read_config
from utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class WanVAE(nn.Module):
    """A `VideoCodec` around an AutoencoderKLWan; 8x smaller in space, and 4x in time after the first frame."""

    def __init__(self, vae: "AutoencoderKLWan") -> None:
        super().__init__()
        if vae.config.patch_size is not None:
            raise ValueError(f"patch_size={vae.config.patch_size}: only the Wan2.1 autoencoder is supported")
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels: int = vae.config.z_dim
        self.spatial_scale: int = 2 ** len(vae.temperal_downsample)
        self.temporal_scale: int = 2 ** sum(vae.temperal_downsample)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1), persistent=False)

    @classmethod
    def from_file(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> "WanVAE":
        """Load the original Wan2.1_VAE.pth (or .safetensors), a diffusers folder, or a release's; nothing is fetched.

        Raises:
            UserError: the weights are missing, unreadable, or not those of a Wan2.1 autoencoder.
        """
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        path = find_part(path, "vae")
        state = load_state_dict(path)
        if path.is_dir():
            config = read_config(path)
        elif "encoder.conv1.weight" in state:
            config = {"base_dim": len(state["encoder.conv1.weight"])}  # the rest is published: diffusers' defaults
            state = convert_wan_vae_to_diffusers(state)
        else:
            raise UserError(f"{path}: is not the original Wan2.1 VAE: it has no tensor 'encoder.conv1.weight'")
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config)
        load_into(vae, state, source=str(path), dtype=dtype)
        return cls(vae)

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

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> normalised latents [B f C h w], the posterior's mode; F = 1 is an image.

        Raises:
            ValueError: H or W is not a multiple of `spatial_scale`, or F is not 1 plus a multiple of `temporal_scale`.
        """
        self.num_latents(frames.shape[1])
        if frames.shape[2] != 3 or frames.shape[-1] % self.spatial_scale or frames.shape[-2] % self.spatial_scale:
            shape = tuple(frames.shape)
            raise ValueError(f"frames {shape} are not [B F 3 H W] with sides a multiple of {self.spatial_scale}")
        frames = rearrange(frames.to(self.vae.dtype), "b f c h w -> b c f h w")
        latents = self.vae.encode(frames).latent_dist.mode()
        return rearrange((latents - self.mean) / self.std, "b c f h w -> b f c h w")

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B f C h w] -> frames [B F 3 H W] in [-1, 1] with F = num_frames(f)."""
        return self.streaming_decoder().decode(latents)

    def streaming_decoder(self) -> "StreamingWanDecoder":
        """A decoder with its own state, for one stream of latents."""
        return StreamingWanDecoder(self)


class StreamingWanDecoder:
    """A `StreamingDecoder`: each causal convolution keeps its last two frames, so memory does not grow."""

    def __init__(self, codec: WanVAE) -> None:
        self._codec = codec
        self._convolutions = codec.vae._cached_conv_counts["decoder"]
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._features: list[Tensor | str | None] = [None] * self._convolutions
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        codec = self._codec
        if latents.ndim != 5 or latents.shape[2] != codec.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)} are not [B f {codec.latent_channels} h w]")
        latents = rearrange(latents, "b f c h w -> b c f h w") * codec.std + codec.mean
        features = codec.vae.post_quant_conv(latents.to(codec.vae.dtype))
        frames = []
        for latent in features.split(1, dim=2):
            # diffusers decodes one latent frame a call, counts convolutions in feat_idx and fills feat_cache in place.
            frames.append(
                codec.vae.decoder(latent, feat_cache=self._features, feat_idx=[0], first_chunk=not self._started)
            )
            self._started = True
        return rearrange(torch.cat(frames, dim=2).clamp(-1, 1), "b c f h w -> b f c h w")
