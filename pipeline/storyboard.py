"""Storyboards: prompts with their times, from the command line or a YAML file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from pipeline.request import PromptSwitch
from pipeline.states import SwitchStyle
from pipeline.steps import even_steps
from utils.errors import UserError
from utils.prompts import one_line

TIME = re.compile(r"(?:(\d+):)?(\d+(?:\.\d+)?)\s*s?")
SETTINGS = {"blend_chunks": (1, 64), "seed": (0, 2**63 - 1), "steps": (1, 50)}  # with their ranges
LONGEST = 2**20  # characters of a storyboard
KEYS = {"at", "prompt", "style", *SETTINGS}


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt and when it begins."""

    seconds: float
    prompt: str
    style: SwitchStyle
    settings: tuple[tuple[str, int], ...] = ()
    """What changes with the prompt: blend_chunks, seed and steps, as far as they are given."""

    def __str__(self) -> str:
        settings = "".join(f"{name}={value} " for name, value in self.settings)
        return f"{self.seconds:g}s {self.style.value} {settings}{self.prompt}"

    def switch(self, at_frame: int) -> PromptSwitch:
        """Return the switch of a stream, with effect from the pixel frame `at_frame` on."""
        settings = dict(self.settings)
        if "steps" in settings:
            settings["denoising_steps"] = even_steps(settings.pop("steps"))
        return PromptSwitch(self.prompt, self.style, at_frame=at_frame, **settings)


def parse_switch(text: str, style: SwitchStyle) -> TimedPrompt:
    """Read a timed prompt such as ``"12s: a cat"`` or ``"1:05: a cat"``.

    Raises:
        UserError: the text has another form.
    """
    time, colon, prompt = text.partition(": ")
    seconds = parse_seconds(time)
    prompt = one_line(prompt)
    if not colon or seconds is None or not prompt:
        raise UserError(f"--switch {text!r}: write a time and a prompt, such as '12s: a cat'")
    return TimedPrompt(seconds, prompt, style)


def read_storyboard(path: str | Path, style: SwitchStyle) -> list[TimedPrompt]:
    """Read a YAML list of ``{at: 12s, prompt: a cat, style: recache}``. An entry without a style gets ``style``.

    Entries may also have blend_chunks, seed and steps, which hold from the entry's time on.

    Raises:
        UserError: the file cannot be read, or an entry is wrong. The error names the entry, counted from 1.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        entries = None if len(text) > LONGEST else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{str(path)[:200]}: cannot read the storyboard: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: is not a list of {{at: 12s, prompt: a cat, style: recache}}")
    return [_read_entry(entry, f"{path}, entry {number}", style) for number, entry in enumerate(entries, start=1)]


def _read_entry(entry: object, where: str, style: SwitchStyle) -> TimedPrompt:
    if not isinstance(entry, dict) or not {"at", "prompt"} <= entry.keys() <= KEYS:
        raise UserError(f"{where}: {entry!r} is not {{at: 12s, prompt: a cat, style: recache}}")
    seconds, prompt = parse_seconds(entry["at"]), entry["prompt"]
    if seconds is None:
        raise UserError(f"{where}: at={entry['at']!r} is not a time such as 12s or '1:05'")
    if not isinstance(prompt, str) or not one_line(prompt):
        raise UserError(f"{where}: prompt={prompt!r} is not a prompt")
    if "style" in entry:
        style = parse_style(entry["style"], where)
    settings = {name: _read_setting(entry[name], name, where) for name in SETTINGS if name in entry}
    return TimedPrompt(seconds, one_line(prompt), style, tuple(settings.items()))


def _read_setting(value: object, name: str, where: str) -> int:
    low, high = SETTINGS[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{where}: {name}={value!r} must be a whole number from {low} to {high}")
    return value


def parse_style(name: object, where: str) -> SwitchStyle:
    """Return the style of that name. For another name, raise a UserError whose message begins with ``where``."""
    names = [style.value for style in SwitchStyle]
    if name not in names:
        raise UserError(f"{where}: style={name!r} is not one of {', '.join(names)}")
    return SwitchStyle(name)


def parse_seconds(time: object) -> float | None:
    """Return the seconds of ``12``, ``"12.5s"`` or ``"1:05"`` (minutes and seconds); None for anything else."""
    if isinstance(time, bool) or not (match := TIME.fullmatch(str(time).strip())):
        return None
    minutes, seconds = match.groups()
    return 60 * int(minutes or 0) + float(seconds)


def check_cues(cues: Sequence[TimedPrompt], seconds: float) -> None:
    """Raise UserError if the times of the prompts do not ascend, or if a video of ``seconds`` ends before the last."""
    for cue, following in pairwise(cues):
        if following.seconds <= cue.seconds:
            raise UserError(f"the prompt at {following.seconds:g}s follows one at {cue.seconds:g}s; times must ascend")
    if cues and cues[0].seconds == 0:
        raise UserError("a switch at 0s would be the first prompt; give that with --prompt")
    if cues and cues[-1].seconds >= seconds:
        raise UserError(
            f"the prompt at {cues[-1].seconds:g}s comes after the video's end at {seconds:.2f}s; "
            "make it longer with --num_output_frames"
        )


def schedule(cues: Sequence[TimedPrompt], fps: float, *, begin: int = 0) -> tuple[PromptSwitch, ...]:
    """Return the prompts as switches of a stream of ``fps`` frames a second; times count from its frame ``begin``."""
    # Rounding must not move a cue past the frame it names.
    return tuple(cue.switch(begin + math.ceil(cue.seconds * fps - 1e-6)) for cue in cues)
