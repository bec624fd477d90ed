"""Training a `TinyVAE` on a simple world: a fixed linear encoder fitted by PCA, and a loss for the decoder.

A linear code keeps the latents as smooth as the pixels and costs no training; all learning goes into the decoder.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size, N values in a
block of `temporal_scale` frames of `patch_size` x `patch_size` pixels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig


@dataclass
class LinearCode:
    """Principal components of blocks of pixels, in a form that the encoder of a TinyVAE can compute."""

    config: TinyVAEConfig
    mean: Tensor
    """Mean block [N], pixels in [0, 1]."""
    basis: Tensor
    """Orthonormal components [C N], the strongest first."""
    scale: Tensor
    """Divisor of each latent channel [C]."""

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [B F 3 H W] in [-1, 1] as latents [B f C h w]."""
        code = (_blocks(frames, self.config) - self.mean) @ (self.basis / self.scale[:, None]).T
        return rearrange(code, "b f h w c -> b f c h w")

    @torch.no_grad()
    def write_to(self, codec: TinyVAE) -> None:
        """Let the encoder of `codec` compute this code, and its decoder the inverse, which training then improves."""
        self._write_encoder(codec.encoder)
        self._write_decoder(codec.decoder)

    def _write_encoder(self, encoder: nn.Sequential) -> None:
        """Write the encoder. Its only ReLU does not change pixels in [0, 1], so the whole encoder is linear on them."""
        first, _, pool, middle, last = encoder
        to_code = self.basis / self.scale[:, None]
        channels, pixels = len(self.basis), len(self.mean) // pool.stride
        for parameter in encoder.parameters():
            parameter.zero_()
        first.weight[:pixels, :, 1, 1] = torch.eye(pixels)
        by_frame = pool.conv.weight[..., 0, 0].unflatten(1, (pool.stride, -1))
        by_frame[:channels, :, :pixels] = rearrange(to_code, "c (s p) -> c s p", s=pool.stride)
        middle.weight[:channels, :channels, 1, 1] = torch.eye(channels)
        last.weight[:, :channels, 1, 1] = torch.eye(channels)
        last.bias.copy_(-to_code @ self.mean)

    def _write_decoder(self, decoder: nn.Sequential) -> None:
        """Write the decoder. ReLUs pass z as its positive and negative part and a constant 1; MemBlocks pass all."""
        _, first, _, *blocks, _, grow, middle, _, last = decoder
        channels, pixels = len(self.basis), len(self.mean) // grow.stride
        first.weight[: 2 * channels + 1] = 0
        first.bias[: 2 * channels] = 0
        first.bias[2 * channels] = 1
        first.weight[:channels, :, 1, 1] = torch.eye(channels)
        first.weight[channels : 2 * channels, :, 1, 1] = -torch.eye(channels)
        for block in blocks:
            block.conv[-1].weight.zero_()
            block.conv[-1].bias.zero_()
        to_pixels = self.basis * self.scale[:, None]
        inverse = torch.cat([to_pixels, -to_pixels, self.mean[None]])
        by_frame = grow.conv.weight[..., 0, 0].unflatten(0, (grow.stride, -1))
        by_frame[:, :pixels] = 0
        by_frame[:, :pixels, : 2 * channels + 1] = rearrange(inverse, "k (s p) -> s p k", s=grow.stride)
        middle.weight[:pixels] = 0
        middle.weight[:pixels, :pixels, 1, 1] = torch.eye(pixels)
        last.weight.zero_()
        last.weight[:, :pixels, 1, 1] = torch.eye(pixels)
        last.bias.zero_()


def fit_linear_code(frames: Tensor, config: TinyVAEConfig) -> LinearCode:
    """Fit the code to sample clips [B F 3 H W] in [-1, 1].

    Each channel is divided by its standard deviation, but by no less than the third largest one. So weak channels
    stay weak, and a denoiser learns what matters for the picture.

    Raises:
        ValueError: a TinyVAE of this config cannot hold a linear code.
    """
    _check_can_hold_code(config)
    blocks = _blocks(frames.cpu(), config).flatten(0, 3).double()  # MPS has no float64
    mean = blocks.mean(0)
    variances, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    basis = vectors.T.flip(0)[: config.latent_channels]
    basis = basis * basis.sum(1, keepdim=True).sign()  # eigenvectors come with either sign
    deviations = variances.flip(0)[: config.latent_channels].clamp_min(0).sqrt()
    return LinearCode(config, mean.float(), basis.float(), deviations.clamp_min(deviations[2]).float())


def _check_can_hold_code(config: TinyVAEConfig) -> None:
    """Raise ValueError unless the encoder is one linear stage that is wide enough; see `LinearCode.write_to`."""
    pixels, channels = 3 * config.patch_size**2, config.latent_channels
    needs = {
        "encoder_blocks = 0": config.encoder_blocks == 0,
        "spatial_strides = (1,)": config.spatial_strides == (1,),
        "first_frame_alone = True": config.first_frame_alone,
        "latent_channels >= 3": channels >= 3,
        f"encoder_widths >= ({max(pixels, channels)}, {channels})": config.encoder_widths[0] >= max(pixels, channels)
        and config.encoder_widths[-1] >= channels,
        f"decoder_widths >= ({max(pixels, 2 * channels + 1)}, {pixels})": config.decoder_widths[0]
        >= max(pixels, 2 * channels + 1)
        and config.decoder_widths[-1] >= pixels,
    }
    if missing := [need for need, met in needs.items() if not met]:
        raise ValueError(f"a linear code needs {' and '.join(missing)}, not {config}")


def _blocks(frames: Tensor, config: TinyVAEConfig) -> Tensor:
    """Cut frames [B F 3 H W] in [-1, 1] into blocks [B f h w N] of pixels in [0, 1]; the first frame is repeated."""
    stride = config.temporal_strides[0]
    frames = torch.cat([frames[:, :1].expand(-1, stride - 1, -1, -1, -1), frames], dim=1)
    pixels = F.pixel_unshuffle((frames + 1) / 2, config.patch_size)
    return rearrange(pixels, "b (f s) p h w -> b f h w (s p)", s=stride)


def disturb(latents: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add noise to the latents [B f C h w] of each clip, of a standard deviation that is uniform in [0, strength].

    A decoder that is trained on them tolerates the small errors of generated latents, and loses little on exact ones.
    """
    deviation = strength * torch.rand(len(latents), 1, 1, 1, 1, generator=generator, device=generator.device)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    return latents + (deviation * noise).to(latents)


def random_window(frames: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Return `length` successive frames of each clip [B F 3 H W] from a random start, so that some contain bounces."""
    starts = torch.randint(frames.shape[1] - length + 1, (len(frames),), generator=generator, device=generator.device)
    return torch.stack([clip[start : start + length] for clip, start in zip(frames, starts.tolist(), strict=True)])


def decoder_loss(decoded: Tensor, frames: Tensor, *, motion_weight: float) -> Tensor:
    """Return the MSE of the pixels plus `motion_weight` times the MSE of the change between frames, of each clip [B].

    Clips are [B F 3 H W]; `decoded` is not limited to [-1, 1] yet. Beyond the limit is no error where the target is at
    the limit. So black and white can stay exact although their latents are not.
    """
    error = torch.where(frames.abs() < 1, decoded, decoded.clamp(-1, 1)) - frames
    return error.square().flatten(1).mean(1) + motion_weight * error.diff(dim=1).square().flatten(1).mean(1)


def psnr(decoded: Tensor, frames: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB over all pixels of [B F 3 H W] in [-1, 1]; higher is better."""
    return -10 * ((decoded - frames) / 2).square().mean().log10()
