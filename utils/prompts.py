"""Prompt files: one prompt a line."""

from __future__ import annotations

import json
from pathlib import Path

from utils.errors import UserError

# Published prompt files: name → where they are.
DOWNLOADS = {"vidprom_filtered_extended.txt": "gdhe17/Self-Forcing"}


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 prompt file, in order.

    Raises:
        UserError: the file is missing, not text, or holds no prompt.
    """
    return [prompt for _, prompt in _numbered_prompts(Path(path))]


def read_image_prompts(path: str | Path) -> tuple[list[Path], list[str]]:
    """Images and prompts of a JSON-lines file: ``{"image": "first.png", "prompt": "..."}``, paths relative to it.

    Raises:
        UserError: names the line that is not such an object or whose image is missing.
    """
    images, prompts = [], []
    for number, line in _numbered_prompts(Path(path)):
        try:
            entry = json.loads(line)
            image, prompt = Path(path).parent / entry["image"], entry["prompt"].strip()
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
            raise UserError(f'{path}, line {number}: is not {{"image": ..., "prompt": ...}}') from None
        if not image.is_file():
            raise UserError(f"{path}, line {number}: image {image} not found")
        images.append(image)
        prompts.append(prompt)
    return images, prompts


def _numbered_prompts(path: Path) -> list[tuple[int, str]]:
    """Non-empty lines with their numbers in the file, from 1."""
    if not path.is_file():
        remedy = ""
        if path.name in DOWNLOADS:
            remedy = f"; download it: hf download {DOWNLOADS[path.name]} {path.name} --local-dir {path.parent}"
        raise UserError(f"{path}: no such prompt file{remedy}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a UTF-8 text file") from None
    prompts = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts
