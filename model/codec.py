"""The protocol that both video codecs follow. Code outside the codecs does not know which of them it uses.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

from typing import Protocol

from torch import Tensor


class StreamingDecoder(Protocol):
    """Decodes one endless stream of latents, chunk by chunk. The joined chunks equal one full decode."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        ...

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        ...


class StreamingEncoder(Protocol):
    """Encodes one endless stream of frames, chunk by chunk. The joined chunks equal one full encode."""

    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next chunk: frames [B F 3 H W] in [-1, 1] that fill whole latents -> latents [B f C h w]."""
        ...

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        ...


class VideoCodec(Protocol):
    """Turns pixels into normalised latents and back. Latent 0 codes one frame, each later one `temporal_scale`."""

    latent_channels: int
    spatial_scale: int
    temporal_scale: int

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [B F 3 H W] in [-1, 1] to latents [B f C h w] on the scale that the denoiser uses."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B f C h w] to frames [B F 3 H W] in [-1, 1] with F = num_frames(f)."""
        ...

    def streaming_encoder(self) -> StreamingEncoder:
        """Make an encoder with its own state, for one stream."""
        ...

    def streaming_decoder(self) -> StreamingDecoder:
        """Make a decoder with its own state, for one stream."""
        ...

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """Estimate the bytes, without the weights, to decode chunks of ``latents`` latents to frames of H x W."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Return how many pixel frames f latent frames decode to: 1 + (f - 1) * temporal_scale."""
        ...

    def num_latents(self, frames: int) -> int:
        """Return how many latent frames F pixel frames encode to."""
        ...
