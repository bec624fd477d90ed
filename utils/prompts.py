"""Prompt files: one prompt a line."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 prompt file, in order.

    Raises:
        UserError: the file is missing, not text, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a UTF-8 text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts
