"""What a viewer asks for, after it was checked."""

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
    """Frames a second at which the viewer plays."""
    seed: int = 0
    num_frames: int | None = None
    """Latent frames; None never ends."""
    steps: int | None = None
    """Denoising steps of a chunk; None is the model's own number."""
    decoder: str = ""
    """Name of the video decoder; "" is the first one on offer."""
    precision: str = "full"
    """Precision of the matrix products: full, or the name of a ``pipeline.optimize.Quantization``."""
    compiled: bool = False
    """Compile the denoiser."""
    scale: int = 1
    """Whole-number enlargement of the clip's file."""
    image: bytes | None = field(default=None, repr=False)
    """First frame, as a PNG."""

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
