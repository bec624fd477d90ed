"""The options of inference.py that are not keys of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import UserError

STRENGTH = 0.6
FILES = ("extended_prompt_path", "extend", "v2v", "storyboard")
HYPHENATED = {"prompt_extend": "prompt-extend"}


@dataclass(frozen=True)
class InferenceOptions:
    """The options of the command line, besides the configuration."""

    prompt: list[str] | None = None
    """Prompts on the command line. They replace the prompt file."""
    data_path: str | None = None
    """The prompt file, if the command line names one. The configuration holds it too."""
    extended_prompt_path: str | None = None
    """A file with long prompts to generate from. Line N belongs to line N of the prompt file."""
    prompt_extend: bool = False
    """Let a text model write the long prompts."""
    i2v: bool = False
    """The prompt file names a first image for each video."""
    extend: str | None = None
    """A video to continue."""
    v2v: str | None = None
    """A video to follow."""
    strength: float | None = None
    """How much a video may differ from the one that it follows, in (0, 1]; None is STRENGTH."""
    switch: list[str] | None = None
    """Prompts to switch to, each written as ``"12s: a cat"``."""
    switch_style: str | None = None
    """How a switch treats the frames before it."""
    storyboard: str | None = None
    """A YAML file of prompts and their times. It replaces `switch`."""
    length_chosen: bool = False
    """Whether the command line sets the number of latent frames."""
    use_ema: bool = False
    """Use averaged weights if a checkpoint holds both."""
    save_with_index: bool = False
    """Name files by the number of the prompt."""
    download: bool = False
    """Download missing published weights first."""
    overwrite: bool = False
    """Make existing videos again."""
    exact_names: bool = False
    """Refuse a folder in which a name belongs to another video. Without it, the new video gets a longer name."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other. Raises UserError."""
        starts = self.given("i2v", "extend", "v2v")
        if len(starts) > 1:
            raise UserError(f"{' and '.join(starts)} each say how a video starts; use one of them")
        if empty := [name for name in FILES if getattr(self, name) is not None and not getattr(self, name).strip()]:
            raise UserError(f"--{empty[0]} is empty; give a file or leave the option out")
        if self.strength is not None and not self.v2v:
            raise UserError("--strength has no effect without --v2v")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"--strength {self.strength:g} must be above 0 and at most 1")
        if self.prompt and self.i2v:
            raise UserError("--prompt cannot be used with --i2v; list images and prompts in --data_path")
        if self.prompt and self.data_path is not None:
            raise UserError("--prompt and --data_path both give prompts; use one of them")
        if self.prompt_extend and self.extended_prompt_path:
            raise UserError("--prompt-extend and --extended_prompt_path both give long prompts; use one of them")
        if self.storyboard and self.switch:
            raise UserError("--storyboard and --switch both say which prompt comes when; use one of them")
        if self.switch_style and not (self.storyboard or self.switch):
            raise UserError(
                "--switch_style has no effect without --switch or --storyboard; add one of them, or leave it out"
            )

    def given(self, *names: str) -> list[str]:
        """Return the flags among `names` that the command line sets, written as on the command line."""
        return [f"--{HYPHENATED.get(name, name)}" for name in names if getattr(self, name)]
