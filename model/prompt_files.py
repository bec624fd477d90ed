"""Prompt embeddings on disk, kept between runs. If all prompts of a run are there, no text encoder is loaded.

Letters: l tokens of a prompt, D embedding channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from model.text_encoder_files import MAX_TEXT_LEN, read_sizes
from model.tokenizer import find_tokenizer, tokenizer_bytes
from model.weights import CONFIG_FILE, find_part, read_file, save_safetensors, weights_hash
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.side_files import read_json, read_limited

log = logging.getLogger(__name__)

MAX_MEMORY_BYTES = 4096


class StoredPrompt(NamedTuple):
    """An embedding without its padding."""

    embeds: Tensor
    """[l D]."""
    text_len: int
    """The number of tokens after padding."""


@dataclass
class EncoderMemory:
    """Facts about an encoder that are stored, so that its files may be deleted after its prompts are stored."""

    encoder: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """The hash of everything that its embeddings depend on."""
    dim: Annotated[int, Field(ge=1, le=2**20)]
    """Embedding channels D."""
    text_len: Annotated[int, Field(ge=1, le=MAX_TEXT_LEN)]
    """Tokens that prompts are padded to."""


class PromptFiles:
    """One safetensors file for each prompt, named by a hash of the encoder and of the cleaned prompt.

    Args:
        folder: is created with the first file.
        memory: identifies the encoder and gives its sizes.
        dtype: the type of the embeddings.
    """

    def __init__(self, folder: str | Path, memory: EncoderMemory, dtype: torch.dtype) -> None:
        self.folder = Path(folder)
        self.encoder = memory.encoder
        self.memory = memory
        self.dtype = dtype

    def path(self, prompt: str) -> Path:
        """Return the file of a cleaned prompt."""
        digest = hashlib.sha256(f"{self.encoder}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"

    def holds(self, prompt: str) -> bool:
        """Return whether the embedding of a cleaned prompt is there and fits the encoder."""
        path = self.path(prompt)
        return path.is_file() and isinstance(self._load(path), StoredPrompt)

    def read(self, prompt: str) -> StoredPrompt | None:
        """Return the stored embedding of a cleaned prompt. If its file does not fit, warn and return None."""
        path = self.path(prompt)
        if not path.is_file():
            return None
        stored = self._load(path)
        if not isinstance(stored, StoredPrompt):
            log.warning("%s: is not a prompt embedding of this encoder (%s); the prompt is encoded again", path, stored)
            return None
        return stored

    def write(self, prompt: str, stored: StoredPrompt) -> None:
        """Store the embedding of a cleaned prompt. If the folder cannot be written to, warn."""
        try:
            state = {"embeds": stored.embeds, "text_len": torch.tensor(stored.text_len)}
            save_safetensors(self.path(prompt), state)
        except OSError as error:
            log.warning("%s: prompt embeddings cannot be stored: %s", self.folder, error.strerror or error)

    def _load(self, path: Path) -> StoredPrompt | Exception:
        """Return the content of a file, or the reason why it does not fit."""
        try:
            state = read_file(path)
            stored = StoredPrompt(state["embeds"].clone(), int(state["text_len"]))
            self._check(stored)
        except (UserError, KeyError, RuntimeError, ValueError) as error:
            return error
        return stored

    def _check(self, stored: StoredPrompt) -> None:
        embeds, expected = stored.embeds, self.memory
        if stored.text_len != expected.text_len:
            raise ValueError(f"text_len={stored.text_len}, the encoder has {expected.text_len}")
        if embeds.ndim != 2 or embeds.shape[1] != expected.dim or not 1 <= len(embeds) <= expected.text_len:
            raise ValueError(
                f"shape {tuple(embeds.shape)}, the encoder gives at most {expected.text_len, expected.dim}"
            )
        if embeds.dtype != self.dtype or not embeds.isfinite().all():
            raise ValueError(f"type {embeds.dtype} or values that are not finite numbers in {self.dtype}")


def open_prompt_files(
    folder: str | Path, weights: str | Path, tokenizer_folder: str | Path | None, dtype: torch.dtype
) -> PromptFiles | None:
    """Open the prompts that an encoder has stored in `folder`. None if the encoder is missing and has no stored hash.

    A hash of weights, tokenizer, config.json and dtype identifies the encoder. The hash is stored under the encoder's
    path, so the encoder may be deleted after its prompts are stored.
    """
    folder = Path(folder).expanduser()
    place = f"{Path(weights).absolute()}\n{tokenizer_folder}\n{dtype}"
    memory = folder / f"{hashlib.sha256(place.encode()).hexdigest()[:40]}.encoder"
    if not Path(weights).exists():
        return _remembered(folder, memory, dtype)
    sizes = read_sizes(find_part(weights, "text_encoder"))
    encoder = EncoderMemory(encoder_digest(weights, tokenizer_folder, dtype), sizes.dim, sizes.text_len)
    try:
        atomic_write_text(memory, json.dumps(asdict(encoder)))
    except OSError as error:
        log.warning("%s: prompt embeddings cannot be stored: %s", folder, error.strerror or error)
        return None
    return PromptFiles(folder, encoder, dtype)


def encoder_digest(weights: str | Path, tokenizer_folder: str | Path | None, dtype: torch.dtype) -> str:
    """Return the hash of everything that the embeddings depend on: weights, tokenizer, config.json and dtype."""
    source = find_part(weights, "text_encoder")
    digest = hashlib.sha256(f"{weights_hash(source)}\n{dtype}".encode())
    tokenizer = find_tokenizer(source, tokenizer_folder)
    digest.update((tokenizer_bytes(tokenizer) if tokenizer.exists() else None) or b"")
    if (source / CONFIG_FILE).is_file():
        digest.update(read_limited(source / CONFIG_FILE))
    return digest.hexdigest()


def _remembered(folder: Path, memory: Path, dtype: torch.dtype) -> PromptFiles | None:
    if not memory.is_file():
        return None
    try:
        return PromptFiles(folder, read_json(memory, EncoderMemory, max_bytes=MAX_MEMORY_BYTES), dtype)
    except UserError as error:
        log.warning("%s; the stored prompt embeddings of this encoder are not used", error)
        return None
