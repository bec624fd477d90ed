"""Converts high dynamic range video (PQ and HLG, as phones record it) for an ordinary screen.

The curves are those of ITU-R BT.2100. Light up to half of BT.2408's reference white (203 nits) keeps its brightness.
Brighter light is compressed by Reinhard's extended curve, so that 1,000 nits become white.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

PQ, HLG = 16, 18  # transfer curves by their numbers in ITU-T H.273
WHITE, PEAK = 203.0, 1000.0  # nits
KNEE = 0.5  # of the reference white: darker light is not changed
BT2020_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's primaries
LEVELS = 65535


def is_hdr(frame: av.VideoFrame) -> bool:
    """Return whether the frame's values are PQ or HLG."""
    return frame.color_trc in (PQ, HLG)


def tone_map(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Turn uint16 [H W 3] in BT.2020 primaries and a transfer curve, PQ or HLG, into sRGB uint8 [H W 3]."""
    light = _to_light(transfer)[pixels]  # 1 is the reference white
    if transfer == HLG:  # the system gamma of a display of 1,000 nits
        light = light * np.maximum(light @ LUMINANCE, 1e-6)[..., None] ** 0.2 * (PEAK / WHITE)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    rgb = np.clip((light * (_compress(brightest) / brightest)) @ BT2020_TO_709.T, 0, 1)
    return _to_srgb()[(rgb * LEVELS).astype(np.uint16)]


def _compress(light: np.ndarray) -> np.ndarray:
    """Map [0, PEAK / WHITE] to [0, 1]. Values below the knee do not change."""
    above, most = ((value - KNEE) / (1 - KNEE) for value in (light, PEAK / WHITE))
    return np.where(light <= KNEE, light, KNEE + (1 - KNEE) * above * (1 + above / most**2) / (1 + above))


@cache
def _to_light(transfer: int) -> np.ndarray:
    """Return a table from 16-bit values to linear light, in units of the reference white (PQ) or the peak (HLG)."""
    value = np.linspace(0, 1, LEVELS + 1, dtype=np.float64)
    if transfer == PQ:
        power = value ** (32 / 2523)
        nits = 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610)
        return (nits / WHITE).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12).astype(np.float32)


@cache
def _to_srgb() -> np.ndarray:
    """Return a table from linear light in [0, 65535] to sRGB in [0, 255]."""
    light = np.linspace(0, 1, LEVELS + 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(curve * 255).astype(np.uint8)
