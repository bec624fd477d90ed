"""Patterns on the surfaces of the rich Shapes world. No prompt names them, so only earlier frames tell how they go on.

Legend: x, y pixels from the centre of the surface; a shade is 0 (the surface's own colour) to 1 (its other colour).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("flat", "stripes", "checks", "dots")
OBJECT_PERIODS, GROUND_PERIODS = (6 / 48, 9 / 48), (10 / 48, 18 / 48)  # as fractions of the resolution
LIGHTER = 0.5  # how far an object's other colour is on the way to white
GROUND_STEP = 38  # difference of a background's two shades, in 8-bit levels of each channel
EDGE = 1.5  # pixels from one shade to the other


@dataclass(frozen=True)
class Pattern:
    """A pattern with a fixed place on its surface."""

    kind: str
    angle: float
    """Radians."""
    period: float
    """Pixels."""
    phase: tuple[float, float]
    """Radians, along and across the angle."""


def draw_pattern(periods: tuple[float, float], resolution: int, generator: torch.Generator) -> Pattern:
    """Draw a kind, and the angle, period and phase uniformly. `periods` are fractions of the resolution."""
    kind, angle, period, *phase = torch.rand(5, generator=generator, device=generator.device).tolist()
    low, high = (bound * resolution for bound in periods)
    return Pattern(
        KINDS[int(kind * len(KINDS))],
        math.pi * angle,
        low + (high - low) * period,
        (2 * math.pi * phase[0], 2 * math.pi * phase[1]),
    )


def shade(pattern: Pattern, x: Tensor, y: Tensor) -> Tensor:
    """Return the shade at positions x and y, which broadcast: in [0, 1], with edges about EDGE pixels wide."""
    if pattern.kind == "flat":
        return torch.zeros_like(x + y)
    frequency, cosine, sine = 2 * math.pi / pattern.period, math.cos(pattern.angle), math.sin(pattern.angle)
    along = frequency * (cosine * x + sine * y) + pattern.phase[0]
    across = frequency * (cosine * y - sine * x) + pattern.phase[1]
    steep = 2 / (EDGE * frequency)
    match pattern.kind:
        case "stripes":
            wave = along.sin()
        case "checks":
            wave = along.sin() * across.sin()
        case "dots":
            wave = (along.cos() + across.cos()) / 2 - 0.25
    return (0.5 + steep * wave / 2).clamp(0, 1)


def other_shade(rgb: tuple[int, int, int], *, ground: bool) -> tuple[int, int, int]:
    """Return the second 8-bit colour of a surface: lighter for an object, a step towards gray for a background."""
    if ground:
        return tuple(value + (GROUND_STEP if value < 128 else -GROUND_STEP) for value in rgb)
    return tuple(round(value + LIGHTER * (255 - value)) for value in rgb)
