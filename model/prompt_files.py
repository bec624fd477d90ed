"""Prompt embeddings kept on disk between runs: with every prompt of a run there, its text encoder is never loaded.

Letters: l tokens of a prompt, D embedding channels.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.weights import read_file, save_safetensors
from utils.errors import UserError

log = logging.getLogger(__name__)


class StoredPrompt(NamedTuple):
    """An embedding without its padding."""

    embeds: Tensor
    """[l D]."""
    text_len: int
    """Tokens to pad it to."""


class PromptFiles:
    """One safetensors file a prompt, named by a hash of the encoder and of the cleaned prompt.

    Args:
        folder: made with the first file.
        encoder: identifies what embeds the prompts.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self.folder = Path(folder)
        self.encoder = encoder

    def path(self, prompt: str) -> Path:
        """Where a cleaned prompt's embedding is."""
        digest = hashlib.sha256(f"{self.encoder}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"

    def holds(self, prompt: str) -> bool:
        """Whether a cleaned prompt's embedding is there."""
        return self.path(prompt).is_file()

    def read(self, prompt: str) -> StoredPrompt | None:
        """The stored embedding of a cleaned prompt; None where there is none, or its file is damaged."""
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            state = read_file(path)
            return StoredPrompt(state["embeds"].clone(), int(state["text_len"]))
        except (UserError, KeyError) as error:
            log.warning("%s: not a stored prompt, it is made anew (%s)", path, error)
            return None

    def write(self, prompt: str, stored: StoredPrompt) -> None:
        """Keep the embedding of a cleaned prompt; a folder that cannot be written to is only logged."""
        try:
            state = {"embeds": stored.embeds, "text_len": torch.tensor(stored.text_len)}
            save_safetensors(self.path(prompt), state)
        except OSError as error:
            log.warning("%s: prompt embeddings are not kept: %s", self.folder, error.strerror or error)
