"""TinyVAE: the TAEHV architecture (github.com/madebyollin/taehv) at any width.

This video autoencoder consists of 2-D convolutions. Only `MemBlock` looks back, by exactly one frame. All frames of a
chunk therefore run as one batch. The only state of a stream is the last frame that each `MemBlock` has seen. Frames and
weights are stored with channels last, because convolutions are fastest with this layout.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size, t time.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.tiny_vae_config import TinyVAEConfig, infer_tiny_config, read_tiny_config
from model.weights import load_into, load_state_dict, save_folder

Memory = dict[int, Tensor]
"""Layer index -> the last frame [B 1 h w c] that layer has seen; empty before a stream begins."""


def channels_last(x: Tensor) -> Tensor:
    """View [n h w c] as [n c h w]."""
    return x.permute(0, 3, 1, 2)


def _conv(n_in: int, n_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """Limits latents smoothly to (-limit, limit)."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.limit) * self.limit


class MemBlock(nn.Module):
    """A residual block that sees each frame and the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Apply the block to frames x [(B t) c h w]. `past` holds the frame before each of them, in the same order."""
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Merges each `stride` successive frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(channels_last(rearrange(x, "(n s) c h w -> n h w (s c)", s=self.stride)))


class TGrow(nn.Module):
    """Splits each frame into `stride` successive ones and repeats pixels `scale` times along both sides.

    The published network repeats pixels first. A 1x1 convolution gives the same result before that, at less cost.
    """

    def __init__(self, width: int, stride: int, scale: int) -> None:
        super().__init__()
        self.stride = stride
        self.scale = scale
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(rearrange(self.conv(x), "n (s c) h w -> (n s) h w c", s=self.stride))
        return F.interpolate(x, scale_factor=self.scale) if self.scale > 1 else x


def _build_encoder(config: TinyVAEConfig) -> nn.Sequential:
    widths = config.encoder_widths
    layers: list[nn.Module] = [_conv(3 * config.patch_size**2, widths[0]), nn.ReLU()]
    for i, (scale, stride) in enumerate(zip(config.spatial_strides, config.temporal_strides, strict=True)):
        layers += [TPool(widths[i], stride), _conv(widths[i], widths[i + 1], stride=scale, bias=False)]
        layers += [MemBlock(widths[i + 1]) for _ in range(config.encoder_blocks)]
    return nn.Sequential(*layers, _conv(widths[-1], config.latent_channels))


def _build_decoder(config: TinyVAEConfig) -> nn.Sequential:
    widths = config.decoder_widths
    layers: list[nn.Module] = [Clamp(config.latent_limit), _conv(config.latent_channels, widths[0]), nn.ReLU()]
    strides = zip(reversed(config.spatial_strides), reversed(config.temporal_strides), strict=True)
    for i, (scale, stride) in enumerate(strides):
        layers += [MemBlock(widths[i]) for _ in range(config.decoder_blocks)]
        # The published network repeats pixels here. The identity keeps the numbers in the parameter names equal.
        layers += [nn.Identity(), TGrow(widths[i], stride, scale), _conv(widths[i], widths[i + 1], bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * config.patch_size**2))


def _run(layers: nn.Sequential, x: Tensor, memory: Memory) -> Tensor:
    """Run all frames of a chunk [B t c h w] as one batch. It reads and updates the memory of the stream."""
    batch = x.shape[0]
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for index, layer in enumerate(layers):
        if isinstance(layer, MemBlock):
            frames = rearrange(x, "(b t) c h w -> b t h w c", b=batch)
            before = memory[index] if index in memory else torch.zeros_like(frames[:, :1])
            memory[index] = frames[:, -1:].clone()
            x = layer(x, channels_last(torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1)))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1))


class TinyVAE(nn.Module):
    """A `VideoCodec`. Its parameters have the names of the published TAEHV weights."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.spatial_scale = config.spatial_scale
        self.temporal_scale = config.temporal_scale
        self.encoder = _build_encoder(config)
        self.decoder = _build_decoder(config)
        self.to(memory_format=torch.channels_last)

    def num_frames(self, latent_frames: int) -> int:
        """Return how many frames latents decode to: the first latent gives 1, each later one `temporal_scale`."""
        return 1 + (latent_frames - 1) * self.temporal_scale

    def num_latents(self, frames: int) -> int:
        """Return how many latent frames `frames` pixel frames encode to.

        Raises:
            ValueError: there is no frame, or the frames do not fill whole latents.
        """
        if frames < 1:
            raise ValueError(f"frames={frames} must be positive")
        if self.config.first_frame_alone and (frames - 1) % self.temporal_scale:
            raise ValueError(f"frames={frames} is not 1 plus a multiple of temporal_scale={self.temporal_scale}")
        return math.ceil(frames / self.temporal_scale)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> latents [B f C h w].

        Raises:
            ValueError: H or W is not a multiple of `spatial_scale`, or F does not suit (see `num_latents`).
        """
        missing = self.num_latents(frames.shape[1]) * self.temporal_scale - frames.shape[1]
        if self.config.first_frame_alone:
            frames = torch.cat([frames[:, :1].expand(-1, missing, -1, -1, -1), frames], dim=1)
        else:
            frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return self._encode_whole(frames, {})

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Decode latents [B f C h w] to frames [B F 3 H W] with F = num_frames(f), in [-1, 1] unless `clamp` is off.

        Training turns `clamp` off: a clamped pixel has no gradient.
        """
        frames = self._decode_whole(latents, {})[:, self.temporal_scale - 1 :]
        return frames.clamp(-1, 1) if clamp else frames

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """See `TinyVAEConfig.decode_bytes`."""
        return self.config.decode_bytes(height, width, latents, self.encoder[0].weight.dtype)

    def streaming_encoder(self) -> "StreamingTinyEncoder":
        """Make an encoder with its own state, for one stream of frames."""
        return StreamingTinyEncoder(self)

    def streaming_decoder(self) -> "StreamingTinyDecoder":
        """Make a decoder with its own state, for one stream of latents."""
        return StreamingTinyDecoder(self)

    def _encode_whole(self, frames: Tensor, memory: Memory) -> Tensor:
        """Encode frames [B (f s) 3 H W], which fill whole latents, to latents [B f C h w]."""
        if frames.shape[2] != 3 or frames.shape[-1] % self.spatial_scale or frames.shape[-2] % self.spatial_scale:
            raise ValueError(
                f"frames {tuple(frames.shape)} are not [B F 3 H W] with sides a multiple of {self.spatial_scale}"
            )
        frames = (frames.to(self.encoder[0].weight.dtype) + 1) / 2
        return _run(self.encoder, F.pixel_unshuffle(frames, self.config.patch_size), memory)

    def _decode_whole(self, latents: Tensor, memory: Memory) -> Tensor:
        """Decode latents [B f C h w] to all their frames [B (f s) 3 H W], unclamped."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)} are not [B f {self.latent_channels} h w]")
        frames = _run(self.decoder, latents.to(self.encoder[0].weight.dtype), memory)
        return F.pixel_shuffle(frames, self.config.patch_size) * 2 - 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`. A file appears only when it is complete."""
        save_folder(folder, self, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TinyVAE":
        """Read a folder that `save_pretrained` wrote. Every name and shape must agree.

        Raises:
            UserError: a file is missing, unreadable, or not a TinyVAE's.
        """
        return cls.from_file(folder, read_tiny_config(folder))

    @classmethod
    def from_file(cls, path: str | Path, config: TinyVAEConfig | None = None) -> "TinyVAE":
        """Read weights under the published names from a folder, .safetensors or .pth (e.g. taew2_1.pth).

        Args:
            config: None infers the sizes from the weights, and assumes that each stage halves both sides, as published.

        Raises:
            UserError: the file is missing, unreadable, or its names or shapes are not those of `config`.
        """
        weights = load_state_dict(path)
        config = infer_tiny_config(weights, str(path)) if config is None else config
        with torch.device("meta"):
            model = cls(config)
        for index, layer in enumerate(model.decoder):
            name = f"decoder.{index}.conv.weight"
            # A published file may contain a TGrow with a longer stride. Its last frames are the ones to keep.
            if isinstance(layer, TGrow) and name in weights:
                weights[name] = weights[name][-len(layer.conv.weight) :]
        load_into(model, weights, source=str(path), dtype=torch.float32)
        return model.to(memory_format=torch.channels_last).eval()


class StreamingTinyDecoder:
    """A `StreamingDecoder`. It stores one past frame per MemBlock, so its memory does not grow with the stream."""

    def __init__(self, codec: TinyVAE) -> None:
        self._codec = codec
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._memory: Memory = {}
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        frames = self._codec._decode_whole(latents, self._memory).clamp(-1, 1)
        trimmed = 0 if self._started else self._codec.temporal_scale - 1
        self._started = True
        return frames[:, trimmed:]


class StreamingTinyEncoder:
    """Encodes one endless stream of frames, chunk by chunk. The joined chunks equal one full encode."""

    def __init__(self, codec: TinyVAE) -> None:
        self._codec = codec
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._memory: Memory = {}
        self._started = False

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next chunk: frames [B F 3 H W] in [-1, 1] -> latents [B f C h w].

        Raises:
            ValueError: F is not a multiple of `temporal_scale` (plus 1 in the first chunk if the first frame is alone).
        """
        scale = self._codec.temporal_scale
        if self._codec.config.first_frame_alone and not self._started:
            frames = torch.cat([frames[:, :1].expand(-1, scale - 1, -1, -1, -1), frames], dim=1)
        if frames.shape[1] == 0 or frames.shape[1] % scale:
            raise ValueError(f"a chunk of {frames.shape[1]} frames does not fill whole latents of {scale} frames")
        latents = self._codec._encode_whole(frames, self._memory)
        self._started = True
        return latents
