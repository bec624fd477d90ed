"""Picks evenly spaced items."""

import numpy as np


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` indices into `count` items, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(wanted, count))})
