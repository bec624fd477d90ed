"""The model card of exported weights: what the Hugging Face hub shows of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from model.transformer import WanConfig
from utils.files import atomic_write_text

CARD_FILE = "README.md"
HEADER = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [text-to-video, self-forcing, autoregressive, wan2.1]
---

# {title}

{about}

| | |
|---|---|
| parameters | {parameters:.1f} million |
| layers, width, heads | {layers}, {dim}, {heads} |
| latent channels | {channels} |
| prediction | {prediction} |
| made from | `{source}` |

The method is Self Forcing ([arXiv:2506.08009](https://arxiv.org/abs/2506.08009)) on the architecture of Wan2.1.
"""


def write_card(
    folder: str | Path, config: WanConfig, *, parameters: int, source: str | Path, about: str, usage: str = ""
) -> Path | None:
    """Write `README.md` into a folder of exported weights. An existing file is kept.

    Args:
        parameters: number of weights.
        source: the weights that were exported.
        about: a sentence that says what the model does.
        usage: a section in Markdown that says how to run it.

    Returns:
        the path of the card, or None if there was one already.
    """
    path = Path(folder) / CARD_FILE
    if os.path.lexists(path):
        return None
    text = HEADER.format(
        title=Path(folder).resolve().name,
        about=about,
        parameters=parameters / 1e6,
        layers=config.num_layers,
        dim=config.dim,
        heads=config.num_heads,
        channels=config.in_dim,
        prediction=config.prediction_type,
        source=Path(source).name,
    )
    atomic_write_text(path, text + (f"\n{usage}" if usage else ""))
    return path
