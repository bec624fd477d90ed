"""Which LoRA files to merge and how much of each: `PATH`, `PATH:SCALE`, `PATH#ADAPTER:SCALE`, or a list of them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from model.weights.fit import weights_hash
from model.weights.lora import LoRA
from model.weights.lora_read import load_lora
from utils.errors import UserError

_CHOICE = re.compile(r"(?P<path>.+?)(#(?P<adapter>[\w.-]+))?(:(?P<scale>[-+]?[\d.]+(e[-+]?\d+)?))?", re.IGNORECASE)


@dataclass(frozen=True)
class LoRAChoice:
    """One file or folder, the adapter in it, and its scale."""

    path: str
    """File or folder."""
    adapter: str | None = None
    """The adapter to use, if the file holds several."""
    scale: float = 1.0
    """Factor of its differences. 1 is as trained."""

    def load(self) -> LoRA:
        """Read the LoRA. Raises UserError."""
        return load_lora(self.path, adapter=self.adapter)


def parse_loras(text: str | Sequence[str] | None) -> list[LoRAChoice]:
    """Return the LoRA files that a configuration names.

    Args:
        text: one entry, a list of entries, or a list as text: ``[a.safetensors:0.8, b.safetensors]``. If a file has
            exactly this name, that file is meant.

    Raises:
        UserError: names the entry that cannot be read.
    """
    if text is None:
        return []
    if isinstance(text, str):
        return _parse_list(text) if text.lstrip().startswith("[") and not _exists(text) else [_parse(text)]
    if not all(isinstance(entry, str) for entry in text):
        raise UserError(f"lora={list(text)}: each entry must be a path, such as a.safetensors or a.safetensors:0.8")
    return [_parse(entry) for entry in text]


def load_loras(text: str | Sequence[str] | None, scale: float = 1.0) -> list[tuple[LoRA, float]]:
    """Read all LoRAs that `text` names (see `parse_loras`), each with its scale times `scale`.

    Raises:
        UserError: a file is missing, unreadable, or holds no LoRA for a Wan transformer.
    """
    return [(choice.load(), scale * choice.scale) for choice in parse_loras(text)]


def loras_hash(loras: Sequence[tuple[LoRA, float]]) -> str:
    """Return a text that identifies LoRAs and their scales: "" for none, else ``+SCALE*HASH`` for each."""
    return "".join(f"+{scale:g}*{weights_hash(lora.tensors())}" for lora, scale in loras)


def _parse_list(text: str) -> list[LoRAChoice]:
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"lora={text[:80]}: is not a list of paths such as [a.safetensors:0.8, b.safetensors]")
    return [_parse(entry) for entry in entries]


def _parse(entry: str) -> LoRAChoice:
    match = _CHOICE.fullmatch(entry)
    if _exists(entry) or match is None:
        return LoRAChoice(entry)
    try:
        scale = float(match["scale"] or 1)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(
            f"lora={entry}: {match['scale']!r} is not a number; write PATH:SCALE, such as a.safetensors:0.8"
        )
    return LoRAChoice(match["path"], match["adapter"], scale)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
