"""Seeds for the purposes of a run: one seed of the user becomes independent ones, the same on every process."""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) from all parts, their types and order: `derive_seed(seed, prompt, "noise")`."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_stream(*parts: int | str) -> torch.Generator:
    """Return a random generator on the CPU whose seed is :func:`derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))
