"""Draw the first images of prompts/i2v.jsonl and prompts/shapes_i2v.jsonl: python scripts/make_first_images.py

Pictures are arrays [H W 3] in [0, 1], painted from back to front; masks are [H W] in [0, 1].
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code
from utils.files import atomic_write_bytes

WIDTH, HEIGHT = 832, 480
SUPERSAMPLING = 2  # drawn larger and averaged, for smooth edges
LARGEST_FILE = 60_000  # bytes
SHAPES_STRIDE = 19  # through the 96 held-out scenes: each colour once, each shape twice

Picture = np.ndarray
Mask = np.ndarray
Colour = tuple[float, float, float]


class Canvas:
    """A picture in progress; x and y run from 0 at the top left to 1 at the bottom right, radii are in heights."""

    def __init__(self, seed: int) -> None:
        rows, columns = HEIGHT * SUPERSAMPLING, WIDTH * SUPERSAMPLING
        self.y, self.x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns]).reshape(2, 1, 1)
        self.aspect = WIDTH / HEIGHT
        self.random = np.random.default_rng(seed)
        self.picture: Picture = np.zeros((rows, columns, 3))

    def sky(self, *stops: tuple[float, Colour]) -> None:
        """Vertical gradient through (y, colour) stops."""
        heights, colours = zip(*stops, strict=True)
        for channel in range(3):
            self.picture[..., channel] = np.interp(self.y, heights, [colour[channel] for colour in colours])

    def paint(self, mask: Mask, colour: Colour | Picture) -> None:
        """Cover with a colour (or a picture) where the mask is 1."""
        self.picture += mask[..., None] * (np.asarray(colour) - self.picture)

    def glow(self, mask: Mask, colour: Colour) -> None:
        """Add light, never beyond white."""
        self.picture += mask[..., None] * np.asarray(colour) * (1 - self.picture)

    def strip(self, left: float, right: float) -> Canvas:
        """The columns between two x; what is painted there is painted here."""
        columns = self.x.shape[1]
        part = copy.copy(self)
        chosen = slice(max(0, int(left * columns)), max(0, int(right * columns) + 1))
        part.x, part.y, part.picture = self.x[:, chosen], self.y[:, chosen], self.picture[:, chosen]
        return part

    def distance(self, x: float, y: float) -> Mask:
        """From a point, in heights."""
        return np.hypot((self.x - x) * self.aspect, self.y - y)

    def disc(self, x: float, y: float, radius: float) -> Mask:
        """A filled circle."""
        return (self.distance(x, y) < radius).astype(float)

    def halo(self, x: float, y: float, radius: float) -> Mask:
        """Light that fades with distance, by a factor e each radius."""
        return np.exp(-self.distance(x, y) / radius)

    def polygon(self, *corners: tuple[float, float]) -> Mask:
        """Inside of a polygon, by the even-odd rule."""
        inside = np.zeros(self.x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:
                crosses = (y0 > self.y) != (y1 > self.y)
                inside ^= crosses & (self.x < (x1 - x0) * (self.y - y0) / (y1 - y0) + x0)
        return inside.astype(float)

    def noise(self, cells: int, octaves: int = 5, stretch: float = 1.0) -> Mask:
        """Fractal noise in [0, 1]; `cells` across the width, `stretch` times wider than high."""
        total = np.zeros(self.x.shape)
        for octave in range(octaves):
            across = cells * 2**octave
            down = max(1, round(across * stretch / self.aspect))
            grid = self.random.random((down + 2, across + 2))
            total += _smooth_lookup(grid, self.y * down, self.x * across) / 2**octave
        return (total - total.min()) / (total.max() - total.min())

    def line(self, cells: int, octaves: int = 6) -> np.ndarray:
        """Fractal noise along x alone [1 W] in [0, 1]."""
        total = np.zeros((1, self.x.shape[1]))
        for octave in range(octaves):
            across = cells * 2**octave
            grid = self.random.random((1, across + 2)).repeat(2, 0)
            total += _smooth_lookup(grid, np.zeros_like(total), self.x[:1] * across) / 2**octave
        return (total - total.min()) / (total.max() - total.min())

    def below(self, line: np.ndarray | float) -> Mask:
        """Everything below a height, given for every column or for all."""
        return (self.y > line).astype(float)

    def stars(self, count: int, below: float) -> Mask:
        """Points of different brightness above the height `below`."""
        rows, columns = self.x.shape
        mask = np.zeros(self.x.shape)
        y, x = self.random.random((2, count))
        spots = (y * below * (rows - 2)).astype(int), (x * (columns - 2)).astype(int)
        brightness = self.random.random(count) ** 3
        for down in range(2):
            for across in range(2):
                mask[spots[0] + down, spots[1] + across] = brightness
        return mask

    def mirror(self, horizon: float, ripple: float, tint: Colour, strength: float) -> None:
        """Fill what is below the horizon with the wavering, tinted reflection of what is above."""
        rows, columns = self.x.shape
        line = int(horizon * rows)
        depth = np.arange(rows - line)[:, None] / (rows - line)
        waves = self.noise(14, 4, stretch=9.0)[line:] - 0.5
        source_y = np.clip(line - 1 - (depth + ripple * waves * (0.3 + depth)) * (rows - line), 0, line - 1).astype(int)
        shift = ripple * columns * 0.06 * waves * (0.2 + depth)
        source_x = np.clip(np.arange(columns)[None] + shift, 0, columns - 1).astype(int)
        reflection = self.picture[source_y, source_x]
        self.picture[line:] = reflection * strength + np.asarray(tint) * (1 - strength)

    def glitter(self, x: float, horizon: float, colour: Colour) -> None:
        """The broken path of light that the sun or moon at `x` lays on water."""
        spread = 0.02 + 0.20 * np.clip(self.y - horizon, 0, 1)
        path = np.exp(-(((self.x - x) / spread) ** 2)) * (self.y > horizon)
        self.glow(path * np.clip(self.noise(60, 3, stretch=5.0) - 0.42, 0, 0.38) * 2.6, colour)

    def forest(self, top: float, height: float, trees: int, colour: Colour) -> None:
        """A row of firs of uneven height whose feet are at `top`, and what is below them."""
        place = self.x[:1] * trees + 0.8 * self.line(trees // 2 or 1, 1)
        tall = 0.45 + 0.55 * self.random.random(2 * trees + 4)[place.astype(int)]
        from_middle = np.abs(place % 1 - 0.5) * 2
        up = (top - self.y) / (height * tall)
        branches = (1 - up) * (0.75 + 0.25 * np.cos(up * 26))
        trunk_or_below = (self.y > top) | ((up > 0) & (up < 1) & (from_middle < branches))
        self.paint(trunk_or_below.astype(float), colour)

    def fir(self, x: float, foot: float, height: float, colour: Colour) -> None:
        """One fir, near enough to show its tiers."""
        up = (foot - self.y) / height
        tier = 1 - up + 0.30 * (0.5 - up * 6 % 1) * (1.1 - up)
        crown = (np.abs(self.x - x) * self.aspect < 0.24 * height * tier) & (up > 0.08) & (up < 1)
        trunk = (np.abs(self.x - x) * self.aspect < 0.02 * height) & (up > 0) & (up <= 0.08)
        self.paint((crown | trunk).astype(float), colour)

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        blocks = self.picture.clip(0, 1).reshape(HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING, 3)
        return Image.fromarray((blocks.mean(axis=(1, 3)) * 255).round().astype(np.uint8))


def _smooth_lookup(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values between the points of a grid, with smooth steps."""
    top, left = y.astype(int), x.astype(int)
    down, across = (part * part * (3 - 2 * part) for part in (y - top, x - left))
    upper = grid[top, left] * (1 - across) + grid[top, left + 1] * across
    bottom = np.minimum(top + 1, grid.shape[0] - 1)
    lower = grid[bottom, left] * (1 - across) + grid[bottom, left + 1] * across
    return upper * (1 - down) + lower * down


def moon_over_sea() -> Canvas:
    canvas = Canvas(1)
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
    return canvas


SUNRISE = (0.235, 0.54)


def balloons_over_hills() -> Canvas:
    canvas = Canvas(2)
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
    return canvas


def _balloon(canvas: Canvas, x: float, y: float, radius: float, colours: tuple[Colour, Colour]) -> None:
    """Envelope with stripes that follow its roundness, ropes and a basket."""
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


def lighthouse_at_dusk() -> Canvas:
    canvas = Canvas(3)
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
    return canvas


def city_by_the_river() -> Canvas:
    canvas = Canvas(4)
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
    return canvas


def _building(canvas: Canvas, left: float, top: float, width: float, tone: Colour, lit: float) -> None:
    """A block with a grid of windows, a share of them lit in warm or cool light."""
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


def dunes_at_sunset() -> Canvas:
    canvas = Canvas(5)
    canvas.sky((0.0, (0.28, 0.30, 0.52)), (0.3, (0.75, 0.48, 0.45)), (0.55, (1.0, 0.72, 0.38)))
    canvas.glow(np.clip((canvas.noise(3, 5, stretch=6.0) - 0.55) * 1.8, 0, 0.5), (0.7, 0.4, 0.35))
    canvas.glow(canvas.halo(0.72, 0.44, 0.20), (1.0, 0.65, 0.25))
    canvas.paint(canvas.disc(0.72, 0.44, 0.07), (1.0, 0.95, 0.72))
    x = canvas.x[:1]
    crests = (
        0.50 + 0.035 * np.sin(7 * x + 1) + 0.02 * canvas.line(4, 2),
        0.60 - 0.07 * np.sin(4.2 * x + 2.4) + 0.02 * canvas.line(3, 2),
        0.74 - 0.13 * np.sin(3.1 * x + 0.2) + 0.015 * canvas.line(3, 2),
    )
    for depth, crest in enumerate(crests):
        near = (depth + 1) / len(crests)
        under = (canvas.y - crest).clip(0)
        facing = np.tanh(6 * np.gradient(crest[0]) * crest.shape[1])  # where the crest falls to the right, to the sun
        wander = near * (0.05 + 0.25 * canvas.line(3, 3)[0]) * np.clip(-facing, 0, 1)
        bright = 0.5 + 0.5 * np.tanh((under - wander) / (0.01 + 0.05 * near))
        ripples = np.sin(210 * (under + 0.05 * canvas.noise(5, 3)) / (0.35 + under) ** 0.7)
        bright = bright * (0.88 + 0.12 * facing) + 0.035 * ripples * near
        shadow, lit = np.array((0.42, 0.24, 0.25)), np.array((0.97 - 0.04 * depth, 0.64 - 0.05 * depth, 0.36))
        canvas.paint(canvas.below(crest), shadow + bright[..., None] * (lit - shadow))
        canvas.paint(canvas.below(crest) * np.exp(-under / 0.12) * (1 - near) * 0.6, (1.0, 0.74, 0.48))
        canvas.glow(np.exp(-(((canvas.y - crest) / 0.003) ** 2)) * 0.4, (1.0, 0.75, 0.45))
    return canvas


def mountain_lake() -> Canvas:
    canvas = Canvas(6)
    canvas.sky((0.0, (0.20, 0.45, 0.80)), (0.55, (0.72, 0.86, 0.95)))
    clouds = np.clip((canvas.noise(3, 7, stretch=2.5) - 0.52) * 3, 0, 0.9)
    canvas.paint(clouds, (0.97, 0.97, 0.98))
    for depth, (top, relief, cells) in enumerate(((0.10, 0.42, 4), (0.26, 0.30, 5))):
        ridge = top + relief * canvas.line(cells, 9)
        slope = canvas.noise(14, 7, stretch=0.6)
        light = np.clip(0.5 - np.gradient(slope, axis=1) * 110, 0, 1)[..., None]
        rock = np.array((0.36, 0.40, 0.50)) * (0.55 + 0.6 * light)
        snow = np.array((0.70, 0.78, 0.92)) + light * np.array((0.28, 0.21, 0.07))
        snow_line = np.clip(((ridge + 0.17) - canvas.y) / 0.05 + (slope - 0.5) * 6, 0, 1)[..., None]
        canvas.paint(canvas.below(ridge), rock + snow_line * (snow - rock))
        canvas.paint(
            canvas.below(ridge) * np.clip((canvas.y - 0.38) / 0.25, 0, 0.6) * (1 - 0.5 * depth), (0.72, 0.84, 0.93)
        )
    for top, tone in ((0.555, (0.16, 0.30, 0.28)), (0.585, (0.07, 0.19, 0.15))):
        canvas.forest(top, 0.035, 90, tone)
    canvas.mirror(0.62, 0.16, (0.10, 0.30, 0.38), 0.78)
    canvas.glow(np.exp(-(((canvas.y - 0.622) / 0.003) ** 2)) * 0.35, (0.8, 0.9, 1.0))
    return canvas


def aurora_over_cabin() -> Canvas:
    canvas = Canvas(7)
    canvas.sky((0.0, (0.01, 0.02, 0.07)), (0.75, (0.05, 0.12, 0.22)))
    canvas.glow(canvas.stars(600, 0.7), (0.9, 0.95, 1.0))
    for lowest, tall, colour, strength in (
        (0.30, 0.10, (0.20, 0.95, 0.55), 0.9),
        (0.48, 0.16, (0.10, 0.85, 0.60), 0.8),
        (0.38, 0.22, (0.55, 0.25, 0.80), 0.5),
    ):
        edge = lowest + 0.22 * (canvas.line(2, 3) - 0.5)
        rays = 0.35 + 0.65 * canvas.line(40, 4) * canvas.line(5, 2)
        height = edge - canvas.y
        curtain = np.where(height > 0, np.exp(-height / (tall * (0.5 + rays))), np.exp(height / 0.012)) * rays
        canvas.glow(np.clip(curtain * strength, 0, 1), colour)
    canvas.forest(0.60, 0.10, 34, (0.02, 0.06, 0.08))
    drift = 0.70 + 0.06 * canvas.line(3, 3)
    snow = (0.75 + 0.25 * canvas.noise(8, 6, stretch=3.0))[..., None] * np.array((0.30, 0.48, 0.56))
    canvas.paint(canvas.below(drift), snow)
    canvas.glow(canvas.below(drift) * canvas.halo(0.35, 0.72, 0.35) * 0.25, (0.3, 1.0, 0.7))
    _cabin(canvas)
    for x, foot, height in ((0.06, 0.93, 0.42), (0.17, 0.88, 0.27), (0.90, 0.95, 0.46), (0.82, 0.86, 0.22)):
        canvas.fir(x, foot, height, (0.01, 0.04, 0.06))
    return canvas


def _cabin(canvas: Canvas) -> None:
    logs = (0.75 + 0.25 * np.sin(canvas.y * 700))[..., None] * np.array((0.17, 0.11, 0.08))
    canvas.paint(canvas.polygon((0.56, 0.66), (0.74, 0.66), (0.74, 0.80), (0.56, 0.80)), logs)
    canvas.paint(canvas.polygon((0.535, 0.675), (0.60, 0.565), (0.70, 0.565), (0.765, 0.675)), (0.55, 0.66, 0.72))
    canvas.paint(canvas.polygon((0.68, 0.52), (0.70, 0.52), (0.70, 0.60), (0.68, 0.60)), (0.12, 0.10, 0.10))
    for x in (0.59, 0.69):
        canvas.paint(canvas.polygon((x, 0.70), (x + 0.025, 0.70), (x + 0.025, 0.755), (x, 0.755)), (1.0, 0.80, 0.40))
        canvas.glow(canvas.halo(x + 0.0125, 0.73, 0.05) * 0.8, (1.0, 0.6, 0.2))
        canvas.glow(canvas.halo(x + 0.0125, 0.84, 0.06) * (canvas.y > 0.80) * 0.6, (1.0, 0.65, 0.25))
    canvas.paint(canvas.polygon((0.64, 0.70), (0.67, 0.70), (0.67, 0.80), (0.64, 0.80)), (0.10, 0.06, 0.05))
    rise = np.clip((0.52 - canvas.y) / 0.3, 0, 1)
    plume = np.exp(-(((canvas.x - 0.69 - 0.10 * rise**1.5) / (0.008 + 0.03 * rise)) ** 2)) * (canvas.y < 0.52)
    canvas.glow(plume * (1 - rise) * canvas.noise(20, 4) * 0.7, (0.6, 0.7, 0.75))


def sailboat_by_an_island() -> Canvas:
    canvas = Canvas(8)
    canvas.sky((0.0, (0.16, 0.48, 0.86)), (0.56, (0.75, 0.90, 0.97)))
    puffs = canvas.noise(4, 7, stretch=1.6) - 0.25 * np.abs(canvas.y - 0.33) / 0.33
    cover = np.clip((puffs - 0.30) * 6, 0, 1) * (canvas.y < 0.56)
    lit = np.clip(0.5 + np.gradient(puffs, axis=0) * 90, 0, 1)[..., None]
    canvas.paint(cover * 0.95, np.array((0.74, 0.80, 0.88)) + lit * np.array((0.26, 0.20, 0.12)))
    island = 0.56 - 0.10 * np.exp(-(((canvas.x[:1] - 0.17) / 0.10) ** 2)) * (0.7 + 0.4 * canvas.line(14))
    green = (0.7 + 0.5 * canvas.noise(50, 4))[..., None] * np.array((0.20, 0.42, 0.25))
    canvas.paint(canvas.below(island), green)
    sea = np.clip((canvas.y - 0.56) / 0.44, 0, 1)[..., None]
    canvas.paint(canvas.below(0.56), np.array((0.05, 0.36, 0.58)) + sea * np.array((0.03, 0.28, 0.16)))
    rows = 0.56 + 0.44 * np.linspace(0.02, 1, 26) ** 1.8
    for row in rows:
        swell = row + 0.02 * (row - 0.5) * (canvas.line(30, 4) - 0.5) * 4
        crest = np.exp(-(((canvas.y - swell) / (0.012 * (row - 0.5))) ** 2)) * np.clip(canvas.line(24, 3) - 0.35, 0, 1)
        canvas.glow(crest * 0.55, (0.6, 0.85, 0.9))
        canvas.paint(
            np.exp(-(((canvas.y - swell - 0.018 * (row - 0.5)) / (0.02 * (row - 0.5))) ** 2)) * 0.22, (0.02, 0.28, 0.45)
        )
    beach = (((canvas.x - 0.17) / 0.145) ** 2 + ((canvas.y - 0.557) / 0.007) ** 2 < 1).astype(float)
    canvas.paint(beach, (0.95, 0.88, 0.68))
    _sailboat(canvas, 0.60, 0.70)
    return canvas


def _sailboat(canvas: Canvas, x: float, y: float) -> None:
    """Hull at the water line (x, y), mast, two sails and foam at the bow."""

    def part(colour: Colour | Picture, *corners: tuple[float, float]) -> None:
        canvas.paint(canvas.polygon(*((x + across, y + up) for across, up in corners)), colour)

    canvas.paint(
        np.exp(-(((canvas.x - x) / 0.10) ** 2 + ((canvas.y - y - 0.05) / 0.035) ** 2)) * 0.5, (0.02, 0.22, 0.35)
    )
    part((0.35, 0.25, 0.18), (0.004, -0.50), (0.009, -0.50), (0.009, -0.03), (0.004, -0.03))
    cloth = (0.82 + 0.18 * np.cos((canvas.x - x) * 14))[..., None]
    part(
        np.array((0.90, 0.22, 0.18)) * cloth,
        (0.002, -0.47),
        (0.0, -0.07),
        (-0.115, -0.065),
        (-0.086, -0.19),
        (-0.046, -0.33),
    )
    part(np.array((0.98, 0.96, 0.90)) * cloth, (0.014, -0.44), (0.062, -0.24), (0.098, -0.055), (0.014, -0.07))
    part((0.97, 0.97, 0.95), (-0.125, -0.045), (0.13, -0.055), (0.095, 0.03), (-0.10, 0.03))
    part((0.12, 0.25, 0.42), (-0.122, -0.03), (0.123, -0.038), (0.117, -0.018), (-0.118, -0.012))
    foam = np.exp(-(((canvas.x - x) / 0.13) ** 2 + ((canvas.y - y - 0.03) / 0.012) ** 2))
    canvas.glow(foam * canvas.noise(70, 4, stretch=2.0), (1.0, 1.0, 1.0))


PICTURES: dict[str, Callable[[], Canvas]] = {
    "moon_over_sea": moon_over_sea,
    "balloons_over_hills": balloons_over_hills,
    "lighthouse_at_dusk": lighthouse_at_dusk,
    "city_by_the_river": city_by_the_river,
    "dunes_at_sunset": dunes_at_sunset,
    "mountain_lake": mountain_lake,
    "aurora_over_cabin": aurora_over_cabin,
    "sailboat_by_an_island": sailboat_by_an_island,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_folder", default="prompts", help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(Path(args.output_folder)))


def run(folder: Path) -> None:
    from utils.files import ensure_writable_folder

    pictures = ensure_writable_folder(folder / "i2v")
    for name, draw in PICTURES.items():
        atomic_write_bytes(pictures / f"{name}.jpg", jpeg(draw().finish()))
    draw_shapes(folder)


def jpeg(image: Image.Image) -> bytes:
    """The best quality that makes a small file."""
    for quality in range(90, 10, -5):
        image.save(file := io.BytesIO(), "JPEG", quality=quality, optimize=True)
        if file.tell() <= LARGEST_FILE:
            break
    return file.getvalue()


def draw_shapes(folder: Path) -> None:
    """First frames of scenes the Shapes model was never trained on, and their list."""
    import torch

    from utils.files import atomic_path, atomic_write_text
    from utils.shapes import held_out_scenes, render_clips
    from utils.video import to_uint8

    scenes = held_out_scenes()[::SHAPES_STRIDE]
    frames = to_uint8(render_clips(scenes, 1, torch.Generator().manual_seed(0))[:, 0])
    lines = []
    for scene, pixels in zip(scenes, frames.numpy(), strict=True):
        name = f"shapes_i2v/{scene.size}_{scene.colour}_{scene.shape}.png"
        with atomic_path(folder / name) as path:
            Image.fromarray(pixels).save(path)
        lines.append(json.dumps({"image": name, "prompt": scene.prompt}) + "\n")
    atomic_write_text(folder / "shapes_i2v.jsonl", "".join(lines))


if __name__ == "__main__":
    sys.exit(main())
