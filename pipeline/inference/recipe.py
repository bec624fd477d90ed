"""The recipe of a video: everything that decides its frames. The mp4 holds it, so a later run recognises the video."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.prompt_files import encoder_digest
from model.weights import find_part, weights_hash
from pipeline.config import PipelineConfig, Sampler, TextConfig
from pipeline.loading import generator_hash, stored_prompts
from utils.config import to_dict
from utils.errors import UserError
from utils.side_files import parse_json
from utils.video.file import read_video_metadata

TAG = "comment"  # the mp4 tag that holds a recipe; "title" holds the prompt
FORMAT = 1
READ_BYTES = 2**20


@dataclass(frozen=True)
class Recipe:
    """All that decides a video and its preferred name. Two videos with equal recipes have equal frames."""

    name: str
    """Preferred file name without its ending."""
    prompt: str
    """The prompt it is generated from: the extended one if there is one."""
    seed: int
    sample: int
    image: str | None
    """Hash of the first image's file."""
    extends: str | None
    """Hash of the file that the video continues."""
    follows: str | None
    """Hash of the file that the video follows."""
    strength: float | None
    """How much it may differ from the file that it follows."""
    switches: tuple[tuple[Any, ...], ...]
    """Second, style and prompt of each change of the prompt, then (name, value) of every setting that changes too."""
    weights: dict[str, str]
    """Hash of the weights of each part: generator, codec, text_encoder."""
    settings: dict[str, Any]
    """Sections of the configuration, only with the keys that decide frames."""
    format: int = FORMAT

    @property
    def text(self) -> str:
        """The recipe as JSON. Equal recipes have equal texts."""
        return json.dumps(_plain_numbers(asdict(self)), sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        """8 hex digits that identify the recipe in a file name."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    @property
    def tags(self) -> dict[str, str]:
        """Tag -> text, for the metadata of the mp4."""
        return {"title": self.prompt, TAG: self.text}

    def differs_only_by_seed(self, other: Recipe | None) -> bool:
        """Return whether `other` is the same video with another seed."""
        return other is not None and replace(other, seed=self.seed).text == self.text


def read_recipe(path: str | Path) -> Recipe | None:
    """Return the recipe in the metadata of a video file; None if it has none."""
    text = read_video_metadata(path).get(TAG, "")
    if not text.startswith("{"):
        return None
    try:
        return parse_json(text.encode(errors="replace"), Recipe, str(path))
    except UserError:
        return None


def file_hash(path: Path | None) -> str | None:
    """Return 16 hex digits that identify a file's content. Raises UserError if it cannot be read."""
    if path is None:
        return None
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def part_hashes(config: PipelineConfig, *, use_ema: bool | None, dtype: torch.dtype) -> dict[str, str]:
    """Return part -> hash of its weights. Only few bytes of each tensor are read, so it takes a second or two."""
    return {
        "generator": generator_hash(config.generator, use_ema=use_ema),
        "codec": weights_hash(find_part(config.codec.weights, "vae")),
        "text_encoder": _text_hash(config.text_encoder, dtype)[:16],
    }


def _text_hash(config: TextConfig, dtype: torch.dtype) -> str:
    files = stored_prompts(config, dtype)
    return encoder_digest(config.weights, config.tokenizer, dtype) if files is None else files.encoder


def deciding_settings(config: PipelineConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings that decide frames. Devices, memory savings and exact kernels only change their rounding."""
    values = to_dict(config)
    settings = {
        "sampler": values["sampler"],
        "generator": {name: values["generator"][name] for name in ("preset", "shift")},
        "rollout": values["rollout"],
        "video": values["video"],
        "quantize": values["optimize"]["quantize"],
        "attention": "8 bits" if config.generator.attention.has_8_bits else "full precision",
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.sampler is not Sampler.rollout:
        settings["sampling"] = values["sampling"]
    return settings


def _plain_numbers(value: Any) -> Any:
    """Return `value` with whole floats as integers, so that 16 and 16.0 are the same setting."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
