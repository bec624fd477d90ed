"""Turn options and prompt files into the list of videos to make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.config import PipelineConfig, Sampler
from pipeline.inference.options import STRENGTH, InferenceOptions
from pipeline.inference.recipe import Recipe, deciding_settings, file_hash
from pipeline.sizes import codec_sizes
from pipeline.storyboard import TimedPrompt, check_cues, parse_style, parse_switch, read_storyboard
from utils import prompt_extend
from utils.errors import UserError
from utils.files import LONGEST_NAME, exact_stem
from utils.prompts import PromptLine, one_line, pair_prompts, read_image_lines, read_prompt_lines
from utils.video.read import stream_video

SUFFIX = ".mp4"
MOST_VIDEOS = 1_000_000
EXTENDED_PROMPTS = "extended_prompts.jsonl"


@dataclass(frozen=True)
class Job:
    """One video to make."""

    title: str
    """The prompt as the user wrote it, and everything else that makes this video different."""
    recipe: Recipe
    image: Path | None = None
    extends: Path | None = None
    follows: Path | None = None
    cues: tuple[TimedPrompt, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the video, in order."""
        return [self.recipe.prompt, *(cue.prompt for cue in self.cues)]


def prompts_of(jobs: Sequence[Job]) -> list[str]:
    """Return every prompt of the jobs, each one once."""
    return list(dict.fromkeys(prompt for job in jobs for prompt in job.prompts))


def plan_jobs(config: PipelineConfig, options: InferenceOptions, dtype: torch.dtype) -> list[Job]:
    """Return every video of the run in order. The hashes of weights in their recipes are still empty.

    Raises:
        UserError: a prompt, image, video or storyboard is missing or does not fit.
    """
    opening, cues = _storyboard(config, options)
    lines, source = _prompt_lines(config, options, opening)
    if (videos := len(lines) * config.inference.num_samples) > MOST_VIDEOS:
        raise UserError(f"{videos} videos are too many for one run; at most {MOST_VIDEOS}: lower --num_samples")
    prompts = _long_prompts(config, options, lines, source)
    extends, follows = (None if video is None else _existing_video(video) for video in (options.extend, options.v2v))
    common = Recipe(
        name="",
        prompt="",
        seed=config.inference.seed,
        sample=0,
        image=None,
        extends=file_hash(extends),
        follows=file_hash(follows),
        strength=None if follows is None else options.strength or STRENGTH,
        switches=tuple((cue.seconds, cue.style.value, cue.prompt, *cue.settings) for cue in cues),
        weights={},
        settings=deciding_settings(config, dtype),
    )
    jobs: dict[str, Job] = {}
    for index, (line, prompt) in enumerate(zip(lines, prompts, strict=True)):
        words = [f"{word} {path.name}" for word, path in (("after", extends), ("by", follows)) if path]
        title = ", ".join([line.prompt, *words, *map(str, cues)])
        image = file_hash(line.image)
        for sample in range(config.inference.num_samples):
            name = _name(config, options, title, index, sample)
            recipe = replace(common, name=name, prompt=prompt, sample=sample, image=image)
            jobs.setdefault(recipe.text, Job(title, recipe, line.image, extends, follows, cues))
    return list(jobs.values())


def _name(config: PipelineConfig, options: InferenceOptions, title: str, index: int, sample: int) -> str:
    """Return the file name of a video without its ending: VBench's `PROMPT-INDEX`, or the official index names."""
    if options.save_with_index:
        return f"{index}-{sample}_{'regular' if config.generator.average(options.use_ema) is False else 'ema'}"
    longest = LONGEST_NAME - len(f"-{sample}{SUFFIX}")
    return f"{exact_stem(title, longest)}-{sample}"


def _prompt_lines(
    config: PipelineConfig, options: InferenceOptions, opening: str | None
) -> tuple[list[PromptLine], str]:
    """Return the prompts that name the videos, and the name of their source."""
    if opening is not None:
        return [PromptLine(1, opening)], f"{options.storyboard}"
    if options.prompt:
        lines = [PromptLine(number, one_line(prompt)) for number, prompt in enumerate(options.prompt, start=1)]
        if not all(line.prompt for line in lines):
            raise UserError("--prompt is empty; write what the video should show")
        return lines, "--prompt"
    path = config.inference.data_path
    if options.i2v:
        return read_image_lines(path), path
    if options.storyboard and options.data_path is None:
        raise UserError(f"{options.storyboard}: has no prompt at 0s, which begins the video; add one, or give --prompt")
    return read_prompt_lines(path), path


def _long_prompts(
    config: PipelineConfig, options: InferenceOptions, lines: Sequence[PromptLine], source: str
) -> list[str]:
    """Return the prompts to generate from: the given ones, those of another file, or those of a text model."""
    names = [line.prompt for line in lines]
    if options.prompt_extend:
        return prompt_extend.extend_prompts(names, Path(config.inference.output_folder) / EXTENDED_PROMPTS)
    if options.extended_prompt_path is not None:
        return pair_prompts(lines, source, options.extended_prompt_path)
    return names


def _storyboard(config: PipelineConfig, options: InferenceOptions) -> tuple[str | None, tuple[TimedPrompt, ...]]:
    """Return the prompt at 0 s of a storyboard, if there is one, and the later prompts."""
    style = parse_style(options.switch_style or "recache", "--switch_style")
    cues = [parse_switch(text, style) for text in options.switch or []]
    if options.storyboard:
        cues = read_storyboard(options.storyboard, style)
    if cues and config.sampler is not Sampler.rollout:
        raise UserError(f"prompts cannot change with sampler={config.sampler.value}; use sampler=rollout")
    first = cues.pop(0) if options.storyboard and cues[0].seconds == 0 else None
    if first is not None and first.settings:
        raise UserError(
            f"{options.storyboard}: the entry at 0s has {first.settings[0][0]}; the video begins with --seed and the "
            "steps of the configuration, so give it there"
        )
    opening = None if first is None else first.prompt
    if opening is not None and (others := options.given("prompt", "data_path", "i2v", "prompt_extend")):
        raise UserError(
            f"{options.storyboard}: the prompt at 0s is the video's first, and {others[0]} "
            "gives one too; leave one of them out"
        )
    check_cues(cues, _seconds(config, options))
    return opening, tuple(cues)


def _seconds(config: PipelineConfig, options: InferenceOptions) -> float:
    """Return the seconds of a video that are generated; infinity if another video decides its length."""
    if options.v2v is not None:
        return math.inf
    scale = codec_sizes(config.codec).temporal_scale
    frames = config.video.num_frames * scale
    return (frames if options.extend is not None else frames - scale + 1) / config.video.fps


def _existing_video(path: str) -> Path:
    """Return the path of a video whose first frame can be read. Raises UserError for any other."""
    next(stream_video(path, 16, 16, fps=1))
    return Path(path)
