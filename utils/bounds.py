"""Bounds of the numbers in configuration schemas. They are defined once here and checked in `__post_init__`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

BOUNDS: Mapping[str, Callable[[float], bool]] = {
    "must be positive": lambda value: value > 0,
    "must not be negative": lambda value: value >= 0,
    "must be at least 1": lambda value: value >= 1,
    "must lie in [0, 1]": lambda value: 0 <= value <= 1,
    "must lie in [0, 1)": lambda value: 0 <= value < 1,
}
"""The end of an error message -> whether a number is within the bound."""
POSITIVE, NOT_NEGATIVE, AT_LEAST_1, SHARE, SHARE_BELOW_1 = BOUNDS


def require(config: Any, bound: str, *names: str) -> None:
    """Check fields of a dataclass. None passes. For a list, every number is checked.

    Raises:
        ValueError: a number is out of the bound, or not finite. The error names the field and quotes the value.
    """
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(math.isfinite(number) and BOUNDS[bound](number) for number in numbers):
            raise ValueError(f"{name}={value} {bound}")
