"""The figures that a part of scripts/endure.py returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number and the limit that it must keep."""

    what: str
    """A description of the number, with its unit."""
    value: float
    limit: str
    """The limit in words, such as "0" or "at most 5 s"."""
    is_kept: bool
    """Whether the value keeps the limit."""
