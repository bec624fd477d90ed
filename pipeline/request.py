"""A request to a pipeline: a prompt, a size, a seed, given frames and changes of the prompt.

Shapes: F pixel frames, H W pixel size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.states import SwitchStyle
from pipeline.steps import checked_steps


@dataclass(frozen=True)
class PromptSwitch:
    """A change of the prompt, and of settings that may change with it."""

    prompt: str
    style: SwitchStyle = SwitchStyle.recache
    blend_chunks: int = 4
    """Number of chunks in which ``blend`` moves to the new prompt."""
    at_frame: int = 0
    """The switch takes effect with the first chunk that begins at this pixel frame or later."""
    seed: int | None = None
    """Seed of the noise from this chunk on. None keeps the seed."""
    denoising_steps: list[float] | None = None
    """Steps of every chunk from this one on, as in RolloutConfig. None keeps the steps."""
    strength: float | None = None
    """As in StreamRequest. None keeps it."""

    def __post_init__(self) -> None:
        if self.denoising_steps is not None:
            checked_steps("denoising_steps", self.denoising_steps)
        if self.strength is not None:
            check_strength(self.strength)
        if not self.prompt.strip():
            raise ValueError("the prompt to switch to is empty")
        if self.blend_chunks < 1:
            raise ValueError(f"blend_chunks={self.blend_chunks} must be at least 1")
        if self.at_frame < 0:
            raise ValueError(f"at_frame={self.at_frame} must not be negative")


@dataclass(frozen=True, eq=False)
class StreamRequest:
    """Everything that decides a video, together with the settings of the pipeline.

    A video does not depend on its batch, on its place in a list, or on the process that makes it.

    Raises:
        ValueError: a value is out of its range, or the switches are not in order.
    """

    prompt: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    seed: int = 0
    sample: int = 0
    """The number of the video among the videos of the same prompt and seed."""
    num_frames: int | None = None
    """Latent frames, given ones included. None: the video never ends."""
    denoising_steps: list[float] | None = None
    """The steps, as in RolloutConfig. None: the pipeline's own."""
    context_frames: Tensor | None = None
    """Given first frames [F 3 H W] in [-1, 1]: an image, or the end of a video."""
    source: Iterable[Tensor | None] | None = None
    """Video to video: frames [F 3 H W] in [-1, 1], in pieces of any length; None means that no frame has come yet.
    The stream ends with its source. The last chunk is filled up with copies of the last frame."""
    strength: float = 0.6
    """How much video to video may change its source, in (0, 1]. A chunk starts from its noised source, at the first
    denoising step that is at most 1000 * strength."""
    switches: tuple[PromptSwitch, ...] = ()
    """Changes of the prompt that are known beforehand, in the order of their frames."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1")
        frames = [switch.at_frame for switch in self.switches]
        if frames != sorted(frames):
            raise ValueError(f"switches at the frames {frames} are not in ascending order")

    def generator(self, purpose: str) -> torch.Generator:
        """Return a random generator on the CPU. Each purpose ("noise", "steps") has its own."""
        key = f"{self.seed}\n{self.sample}\n{purpose}\n{self.prompt}".encode()
        digest = hashlib.sha256(key).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1")
