"""The folder of this code. Its configurations, weights and prompts are found from any current folder."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def find_shipped(path: str) -> str:
    """Return the path. If it is relative and exists in the checkout alone, return it with the checkout's folder.

    The current folder comes first, so a file of the user is never exchanged for one of the checkout.
    """
    shipped = os.path.join(CHECKOUT, path)
    if not path or os.path.exists(os.path.expanduser(path)) or not os.path.exists(shipped):
        return path
    return shipped
