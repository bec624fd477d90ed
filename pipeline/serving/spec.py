"""Checked requests of a viewer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StreamSpec:
    """A checked request for a stream."""

    prompt: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fps: int
    """Frames per second at which the viewer plays."""
    seed: int = 0
    num_frames: int | None = None
    """Number of latent frames. None: the stream never ends."""
    steps: int | None = None
    """Denoising steps of a chunk. None: the model's own number."""
    decoder: str = ""
    """Name of the video decoder. "": the first one that the model offers."""
    precision: str = "full"
    """Precision of the matrix products: "full", or the name of a ``pipeline.optimize.Quantization``."""
    compiled: bool = False
    """Whether the denoiser is compiled."""
    scale: int = 1
    """Whole factor by which the frames of the clip's file are enlarged."""
    image: bytes | None = field(default=None, repr=False)
    """The first frame as a PNG."""

    @property
    def kind(self) -> tuple:
        """Streams of the same kind can be made as one batch."""
        return self.height, self.width, self.steps, self.decoder, self.precision, self.compiled


@dataclass(frozen=True)
class PromptChange:
    """A new prompt for a running stream."""

    prompt: str
    style: str
    """Name of a ``pipeline.rollout.SwitchStyle``."""
    id: int = 0
    """The client's number for it, which the answer repeats."""
