"""First images: the sea at night, balloons, a lighthouse, a city."""

from __future__ import annotations

import numpy as np

from scripts.first_images.canvas import Canvas, Colour


def moon_over_sea(canvas: Canvas) -> None:
    canvas.sky((0.0, (0.02, 0.03, 0.10)), (0.45, (0.07, 0.13, 0.30)), (0.62, (0.25, 0.33, 0.50)))
    canvas.glow(canvas.stars(420, 0.55), (0.9, 0.92, 1.0))
    canvas.glow(canvas.halo(0.66, 0.24, 0.16), (0.35, 0.42, 0.55))
    clouds = np.clip((canvas.noise(4, 6, stretch=3.0) - 0.52) * 2.2, 0, 0.55)
    canvas.glow(clouds, (0.45, 0.52, 0.68))
    headland = 0.63 - 0.14 * np.clip(1 - canvas.x[:1] / 0.36, 0, 1) ** 0.6 * (0.6 + 0.4 * canvas.line(4))
    canvas.paint(canvas.below(headland) * (canvas.x < 0.36), (0.03, 0.05, 0.10))
    canvas.mirror(0.62, 0.5, (0.02, 0.05, 0.13), 0.6)
    moon = canvas.disc(0.66, 0.24, 0.085)
    canvas.paint(moon, (0.98, 0.96, 0.88))
    canvas.paint(moon * np.clip(canvas.noise(26, 3) - 0.5, 0, 1) * 1.3, (0.62, 0.62, 0.66))
    canvas.glitter(0.66, 0.62, (0.95, 0.92, 0.80))


SUNRISE = (0.235, 0.54)


def balloons_over_hills(canvas: Canvas) -> None:
    canvas.sky((0.0, (0.35, 0.58, 0.85)), (0.4, (0.75, 0.82, 0.88)), (0.68, (1.0, 0.86, 0.66)))
    canvas.glow(np.clip((canvas.noise(3, 6, stretch=4.0) - 0.55) * 1.6, 0, 0.5), (0.8, 0.75, 0.7))
    canvas.glow(canvas.halo(*SUNRISE, 0.16), (0.9, 0.62, 0.25))
    canvas.paint(canvas.disc(*SUNRISE, 0.045), (1.0, 0.97, 0.85))
    for depth, top in enumerate((0.64, 0.69, 0.75, 0.82, 0.90)):
        far = 1 - depth / 4
        near_green = (0.16 + 0.03 * depth, 0.36 - 0.02 * depth, 0.14)
        colour = far * np.array((0.78, 0.76, 0.68)) + (1 - far) * np.array(near_green)
        hill = canvas.below(top - 0.10 * canvas.line(3 + depth, 4 + depth // 2))
        texture = 0.85 + 0.3 * canvas.noise(20 + 10 * depth, 4, stretch=2.0)
        canvas.paint(hill, colour * texture[..., None])
        canvas.glow(hill * canvas.halo(*SUNRISE, 0.30) * 0.5, (0.9, 0.6, 0.3))
    for x, y, radius, colours in (
        (0.50, 0.30, 0.150, ((0.86, 0.16, 0.15), (0.98, 0.80, 0.22))),
        (0.78, 0.20, 0.085, ((0.13, 0.42, 0.75), (0.95, 0.95, 0.92))),
        (0.30, 0.22, 0.062, ((0.95, 0.52, 0.12), (0.55, 0.14, 0.45))),
        (0.90, 0.47, 0.048, ((0.10, 0.60, 0.50), (0.98, 0.88, 0.40))),
        (0.12, 0.40, 0.040, ((0.80, 0.20, 0.40), (0.95, 0.90, 0.85))),
        (0.66, 0.52, 0.030, ((0.45, 0.25, 0.65), (0.98, 0.70, 0.30))),
    ):
        _balloon(canvas.strip(x - radius, x + radius), x, y, radius, colours)


def _balloon(canvas: Canvas, x: float, y: float, radius: float, colours: tuple[Colour, Colour]) -> None:
    """Paint a balloon: a round envelope with stripes, ropes and a basket."""
    across, down = (canvas.x - x) * canvas.aspect / radius, (canvas.y - y) / radius
    taper = np.where(down > 0.35, np.clip(1 - (down - 0.35) / 1.25, 0, 1) ** 0.8 * 0.94 + 0.06, 1)
    half_width = np.sqrt(np.clip(1 - np.clip(down, -1, 0.35) ** 2, 0, 1)) * taper
    inside = (np.abs(across) < half_width) & (down > -1) & (down < 1.45)
    turn = np.arcsin(np.clip(across / np.maximum(half_width, 1e-6), -1, 1)) / np.pi + 0.5
    stripes = (np.floor(turn * 8) % 2)[..., None]
    shade = (0.62 + 0.45 * np.cos((turn - 0.35) * 2.2))[..., None]
    canvas.paint(inside.astype(float), (stripes * colours[0] + (1 - stripes) * np.array(colours[1])) * shade)
    ropes = (np.abs(np.abs(across) - 0.11) < 0.012) & (down > 1.45) & (down < 1.75)
    basket = (np.abs(across) < 0.14) & (down > 1.72) & (down < 1.95)
    canvas.paint((ropes | basket).astype(float), (0.35, 0.22, 0.12))


def lighthouse_at_dusk(canvas: Canvas) -> None:
    canvas.sky((0.0, (0.16, 0.14, 0.33)), (0.35, (0.45, 0.30, 0.48)), (0.66, (0.96, 0.58, 0.36)))
    streaks = np.clip((canvas.noise(3, 6, stretch=5.0) - 0.50) * 2.0, 0, 0.8)
    canvas.paint(streaks, (0.55, 0.32, 0.42))
    canvas.glow(canvas.halo(0.80, 0.66, 0.20), (0.9, 0.5, 0.2))
    canvas.mirror(0.66, 0.7, (0.10, 0.10, 0.22), 0.6)
    canvas.glitter(0.80, 0.66, (1.0, 0.72, 0.45))
    cliff = canvas.below(0.60 + 0.10 * canvas.line(5) + 1.6 * np.clip(canvas.x[:1] - 0.34, 0, 1) ** 1.15)
    rock = 0.55 + 0.9 * canvas.noise(24, 6, stretch=0.5)
    canvas.paint(cliff, np.array((0.13, 0.11, 0.14)) * rock[..., None])
    foam = np.clip(1 - np.abs(canvas.y - 0.93 - 0.05 * canvas.line(12)) / 0.05, 0, 1)
    foam *= np.exp(-(((canvas.x - 0.55) / 0.10) ** 2))
    canvas.glow(foam * canvas.noise(50, 4, stretch=2.0) ** 2, (0.95, 0.85, 0.88))
    lamp = (0.27, 0.205)
    angle = np.arctan2(canvas.y - lamp[1], (canvas.x - lamp[0]) * canvas.aspect)
    for direction in (-0.10, np.pi - 0.10):
        off = np.abs(np.angle(np.exp(1j * (angle - direction))))
        canvas.glow(np.exp(-((off / 0.075) ** 2)) * canvas.halo(*lamp, 0.55) * 0.9, (1.0, 0.93, 0.70))
    side = np.clip((canvas.x - 0.27) / 0.035, -1, 1)
    plaster = (0.50 + 0.42 * np.sqrt(1 - (side - 0.45).clip(-1, 1) ** 2))[..., None]
    tower = canvas.polygon((0.247, 0.25), (0.293, 0.25), (0.308, 0.67), (0.232, 0.67))
    red = ((np.floor((canvas.y - 0.25) / 0.105) % 2) == 0)[..., None]
    canvas.paint(tower, np.where(red, (0.80, 0.20, 0.18), (0.95, 0.92, 0.90)) * plaster)
    dark = (0.10, 0.09, 0.12)
    canvas.paint(canvas.polygon((0.238, 0.24), (0.302, 0.24), (0.302, 0.256), (0.238, 0.256)), dark)
    canvas.paint(canvas.polygon((0.254, 0.175), (0.286, 0.175), (0.286, 0.24), (0.254, 0.24)), (1.0, 0.90, 0.60))
    for x in (0.254, 0.265, 0.275, 0.286):
        canvas.paint((np.abs(canvas.x - x) < 0.0012) * (canvas.y > 0.175) * (canvas.y < 0.24), dark)
    canvas.paint(canvas.polygon((0.248, 0.178), (0.292, 0.178), (0.27, 0.125)), dark)
    canvas.glow(canvas.halo(*lamp, 0.05), (1.0, 0.85, 0.5))


def city_by_the_river(canvas: Canvas) -> None:
    canvas.sky((0.0, (0.03, 0.03, 0.10)), (0.45, (0.13, 0.09, 0.26)), (0.68, (0.45, 0.24, 0.38)))
    canvas.glow(canvas.stars(120, 0.35), (0.8, 0.8, 0.9))
    for row, (tone, height, lit) in enumerate((((0.16, 0.12, 0.26), 0.34, 0.2), ((0.06, 0.06, 0.13), 0.44, 0.45))):
        left = -0.02
        while left < 1:
            width = canvas.random.uniform(0.03, 0.075)
            middle = np.exp(-(((left - 0.55) / 0.35) ** 2))
            top = 0.68 - height * canvas.random.uniform(0.25, 0.6 + 0.4 * middle)
            _building(canvas.strip(left - 0.02, left + width + 0.02), left, top, width, tone, lit)
            left += width * canvas.random.uniform(0.75, 1.15) + 0.004 * row
    canvas.glow(canvas.halo(0.5, 0.70, 0.35) * (canvas.y < 0.68), (0.38, 0.18, 0.30))
    canvas.mirror(0.68, 0.35, (0.05, 0.04, 0.12), 0.7)
    canvas.paint(canvas.below(0.675) * (canvas.y < 0.685), (0.05, 0.05, 0.09))
    for x in np.linspace(0.02, 0.98, 25):
        lamp = canvas.strip(x - 0.04, x + 0.04)
        lamp.glow(np.clip(lamp.halo(x, 0.672, 0.008) * 1.4, 0, 1), (1.0, 0.78, 0.45))


def _building(canvas: Canvas, left: float, top: float, width: float, tone: Colour, lit: float) -> None:
    """Paint a building with a grid of windows. The share `lit` of them has warm or cool light."""
    block = (canvas.x > left) & (canvas.x < left + width) & (canvas.y > top) & (canvas.y < 0.68)
    canvas.paint(block.astype(float), tone)
    column, row = (canvas.x - left) / 0.0085, (canvas.y - top) / 0.018
    window = block & (column % 1 > 0.3) & (row % 1 > 0.45) & (column > 0.6) & (column < width / 0.0085 - 0.4)
    states = canvas.random.random((64, 64))
    state = states[row.astype(int) % 64, column.astype(int) % 64]
    warmth = canvas.random.random((64, 64))[row.astype(int) % 64, column.astype(int) % 64][..., None]
    light = warmth * (1.0, 0.80, 0.45) + (1 - warmth) * np.array((0.75, 0.85, 1.0))
    canvas.paint((window & (state < lit)) * (0.35 + 0.65 * state / lit), light)
    if width > 0.055:
        mast = (np.abs(canvas.x - left - width / 2) < 0.0012) & (canvas.y > top - 0.07) & (canvas.y <= top)
        canvas.paint(mast.astype(float), tone)
        canvas.glow(np.clip(canvas.halo(left + width / 2, top - 0.07, 0.006) * 1.3, 0, 1), (1.0, 0.2, 0.15))
