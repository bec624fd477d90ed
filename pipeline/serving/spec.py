"""Checked requests of a viewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.live_source import LiveSource


KEYS_OF_A_CLIP = (
    "inference.seed",
    "inference.data_path",
    "inference.output_folder",
    "video.num_frames",
    "video.fps",
)
"""Keys that the command of a clip sets with options of its own."""


@dataclass(frozen=True)
class ModelSource:
    """The source of a model, as the command line names it."""

    config_path: str
    """The YAML file."""
    checkpoint_path: str | None = None
    """Weights of the generator in place of those that the file names."""
    settings: tuple[str, ...] = ()
    """Keys that replace those of the file, each as ``key=value``."""
    use_ema: bool = False
    """Use averaged weights if a checkpoint holds both."""
    download: bool = False
    """Fetch the published weights that are missing first."""
    offer_download: bool = False
    """Raise ``missing.MissingWeights`` for published weights that are missing, so that the page can offer them."""
    tiny_decoder: Path | None = None
    """TAEHV weights to offer beside the configured Wan VAE."""

    @property
    def overrides(self) -> list[str]:
        """All keys that replace those of the file."""
        weights = [] if self.checkpoint_path is None else [f"generator.weights={self.checkpoint_path}"]
        return [*weights, *self.settings]

    @property
    def arguments(self) -> list[str]:
        """The arguments with which inference.py loads the same model, without what each clip says of itself."""
        weights = [] if self.checkpoint_path is None else [f"--checkpoint_path={self.checkpoint_path}"]
        settings = [text for text in self.settings if text.partition("=")[0] not in KEYS_OF_A_CLIP]
        return [f"--config_path={self.config_path}", *weights, *(["--use_ema"] if self.use_ema else []), *settings]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each file: its last parts without the suffix, as few parts as tell the files apart.

    Raises:
        UserError: a file is named twice.
    """
    whole = [Path(path).resolve() for path in paths]
    for path, file in zip(paths, whole, strict=True):
        if whole.count(file) > 1:
            raise UserError(f"--config_path {path}: this file is named twice; name it once")
    for depth in range(1, max(len(file.parts) for file in whole)):
        names = ["/".join(file.with_suffix("").parts[-depth:]) for file in whole]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))


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
    source: LiveSource | None = field(default=None, repr=False)
    """The frames that the video follows."""
    strength: float = 0.6
    """How much the video may change its source, in (0, 1]."""
    record: bool = True
    """Whether a clip begins with the stream."""

    @property
    def kind(self) -> tuple:
        """Streams of the same kind can be made as one batch. One with a source is alone."""
        return id(self.source), self.height, self.width, self.steps, self.decoder, self.precision, self.compiled


@dataclass(frozen=True)
class PromptChange:
    """A new prompt or new settings for a running stream. None keeps a value."""

    prompt: str | None
    style: str
    """Name of a ``pipeline.states.SwitchStyle``."""
    id: int = 0
    """The client's number for it, which the answer repeats."""
    blend_chunks: int | None = None
    """Chunks in which a blend moves to the new prompt."""
    seed: int | None = None
    steps: int | None = None
    strength: float | None = None

    def after(self, earlier: PromptChange | None, prompt: str) -> PromptChange:
        """Return this change together with one that did not take effect yet; `prompt` is the prompt until now."""
        if earlier is None:
            return replace(self, prompt=self.prompt or prompt)
        kept = {name: getattr(earlier, name) for name in SETTINGS if getattr(self, name) is None}
        if self.prompt is None:
            kept |= {"prompt": earlier.prompt, "style": earlier.style}
        return replace(self, **kept)

    @property
    def settings(self) -> dict[str, int | float]:
        """The settings that change."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


SETTINGS = ("blend_chunks", "seed", "steps", "strength")
