"""The protocol both video codecs follow; nothing outside the codecs knows which one it drives.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from typing import Protocol

from torch import Tensor


class StreamingDecoder(Protocol):
    """Decodes one endless stream of latents chunk after chunk; the chunks joined equal one full decode."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        ...

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        ...


class StreamingEncoder(Protocol):
    """Encodes one endless stream of frames chunk after chunk; the chunks joined equal one full encode."""

    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next chunk: frames [B F 3 H W] in [-1, 1], whole latents of them -> latents [B f C h w]."""
        ...

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        ...


class VideoCodec(Protocol):
    """Pixels to normalised latents and back. Latent 0 stands for one frame, each later one for `temporal_scale`."""

    latent_channels: int
    spatial_scale: int
    temporal_scale: int

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> latents [B f C h w] as the denoiser sees them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B f C h w] -> frames [B F 3 H W] in [-1, 1] with F = num_frames(f)."""
        ...

    def streaming_encoder(self) -> StreamingEncoder:
        """An encoder with its own state, for one stream."""
        ...

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder with its own state, for one stream."""
        ...

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """Estimate of what decoding chunks of so many latents to frames of H x W takes beside the weights."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Pixel frames that f latent frames decode to: 1 + (f - 1) * temporal_scale."""
        ...

    def num_latents(self, frames: int) -> int:
        """Latent frames that F pixel frames encode to."""
        ...
