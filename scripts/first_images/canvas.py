"""A canvas on which code paints pictures from back to front.

Pictures are arrays [H W 3] in [0, 1]; masks are [H W] in [0, 1].
"""

from __future__ import annotations

import copy

import numpy as np
from PIL import Image

SUPERSAMPLING = 2  # drawn larger and averaged, for smooth edges

Picture = np.ndarray
Mask = np.ndarray
Colour = tuple[float, float, float]


class Canvas:
    """A picture in progress. x and y go from 0 at the top left to 1 at the bottom right. Radii are in heights."""

    def __init__(self, width: int, height: int, *, seed: int) -> None:
        """Make a black canvas. The finished picture has `width` x `height` pixels."""
        self.width, self.height = width, height
        rows, columns = height * SUPERSAMPLING, width * SUPERSAMPLING
        self.y, self.x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns]).reshape(2, 1, 1)
        self.aspect = width / height
        self.random = np.random.default_rng(seed)
        self.picture: Picture = np.zeros((rows, columns, 3))

    def sky(self, *stops: tuple[float, Colour]) -> None:
        """Fill with a vertical gradient through (y, colour) stops."""
        heights, colours = zip(*stops, strict=True)
        for channel in range(3):
            self.picture[..., channel] = np.interp(self.y, heights, [colour[channel] for colour in colours])

    def paint(self, mask: Mask, colour: Colour | Picture) -> None:
        """Cover the canvas with a colour or a picture at the places with mask 1."""
        self.picture += mask[..., None] * (np.asarray(colour) - self.picture)

    def glow(self, mask: Mask, colour: Colour) -> None:
        """Add light, never beyond white."""
        self.picture += mask[..., None] * np.asarray(colour) * (1 - self.picture)

    def strip(self, left: float, right: float) -> Canvas:
        """Return the columns between two x as a canvas. Painting on it paints on this canvas."""
        columns = self.x.shape[1]
        part = copy.copy(self)
        chosen = slice(max(0, int(left * columns)), max(0, int(right * columns) + 1))
        part.x, part.y, part.picture = self.x[:, chosen], self.y[:, chosen], self.picture[:, chosen]
        return part

    def distance(self, x: float, y: float) -> Mask:
        """Return the distance from a point, in heights."""
        return np.hypot((self.x - x) * self.aspect, self.y - y)

    def disc(self, x: float, y: float, radius: float) -> Mask:
        """Return a filled circle."""
        return (self.distance(x, y) < radius).astype(float)

    def halo(self, x: float, y: float, radius: float) -> Mask:
        """Return light that fades with the distance: by a factor of e for each radius."""
        return np.exp(-self.distance(x, y) / radius)

    def polygon(self, *corners: tuple[float, float]) -> Mask:
        """Return the inside of a polygon, by the even-odd rule."""
        inside = np.zeros(self.x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:
                crosses = (y0 > self.y) != (y1 > self.y)
                inside ^= crosses & (self.x < (x1 - x0) * (self.y - y0) / (y1 - y0) + x0)
        return inside.astype(float)

    def noise(self, cells: int, octaves: int = 5, stretch: float = 1.0) -> Mask:
        """Return fractal noise in [0, 1]; `cells` across the width, `stretch` times wider than high."""
        total = np.zeros(self.x.shape)
        for octave in range(octaves):
            across = cells * 2**octave
            down = max(1, round(across * stretch / self.aspect))
            grid = self.random.random((down + 2, across + 2))
            total += _smooth_lookup(grid, self.y * down, self.x * across) / 2**octave
        return (total - total.min()) / (total.max() - total.min())

    def line(self, cells: int, octaves: int = 6) -> np.ndarray:
        """Return fractal noise along x alone, [1 W] in [0, 1]."""
        total = np.zeros((1, self.x.shape[1]))
        for octave in range(octaves):
            across = cells * 2**octave
            grid = self.random.random((1, across + 2)).repeat(2, 0)
            total += _smooth_lookup(grid, np.zeros_like(total), self.x[:1] * across) / 2**octave
        return (total - total.min()) / (total.max() - total.min())

    def below(self, line: np.ndarray | float) -> Mask:
        """Return everything below a height, given for every column or for all."""
        return (self.y > line).astype(float)

    def stars(self, count: int, below: float) -> Mask:
        """Return points of different brightness above the height `below`."""
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
        """Fill the part below the horizon with a wavy, tinted reflection of the part above it."""
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
        """Paint the reflection of the sun or moon at `x` on waves."""
        spread = 0.02 + 0.20 * np.clip(self.y - horizon, 0, 1)
        path = np.exp(-(((self.x - x) / spread) ** 2)) * (self.y > horizon)
        self.glow(path * np.clip(self.noise(60, 3, stretch=5.0) - 0.42, 0, 0.38) * 2.6, colour)

    def forest(self, top: float, height: float, trees: int, colour: Colour) -> None:
        """Paint a row of firs of different heights, whose lower ends are at `top`, and the ground below them."""
        place = self.x[:1] * trees + 0.8 * self.line(trees // 2 or 1, 1)
        tall = 0.45 + 0.55 * self.random.random(2 * trees + 4)[place.astype(int)]
        from_middle = np.abs(place % 1 - 0.5) * 2
        up = (top - self.y) / (height * tall)
        branches = (1 - up) * (0.75 + 0.25 * np.cos(up * 26))
        trunk_or_below = (self.y > top) | ((up > 0) & (up < 1) & (from_middle < branches))
        self.paint(trunk_or_below.astype(float), colour)

    def fir(self, x: float, foot: float, height: float, colour: Colour) -> None:
        """Paint one fir that is near enough to show its tiers."""
        up = (foot - self.y) / height
        tier = 1 - up + 0.30 * (0.5 - up * 6 % 1) * (1.1 - up)
        crown = (np.abs(self.x - x) * self.aspect < 0.24 * height * tier) & (up > 0.08) & (up < 1)
        trunk = (np.abs(self.x - x) * self.aspect < 0.02 * height) & (up > 0) & (up <= 0.08)
        self.paint((crown | trunk).astype(float), colour)

    def finish(self) -> Image.Image:
        """Return the picture at its final size."""
        blocks = self.picture.clip(0, 1).reshape(self.height, SUPERSAMPLING, self.width, SUPERSAMPLING, 3)
        return Image.fromarray((blocks.mean(axis=(1, 3)) * 255).round().astype(np.uint8))


def _smooth_lookup(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the values between the points of a grid, with smooth steps."""
    top, left = y.astype(int), x.astype(int)
    down, across = (part * part * (3 - 2 * part) for part in (y - top, x - left))
    upper = grid[top, left] * (1 - across) + grid[top, left + 1] * across
    bottom = np.minimum(top + 1, grid.shape[0] - 1)
    lower = grid[bottom, left] * (1 - across) + grid[bottom, left + 1] * across
    return upper * (1 - down) + lower * down
