"""First images: dunes, a mountain lake, northern lights, a sailing boat."""

from __future__ import annotations

import numpy as np

from scripts.first_images.canvas import Canvas, Colour, Picture


def dunes_at_sunset(canvas: Canvas) -> None:
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
        facing = np.tanh(6 * np.gradient(crest[0]) * crest.shape[1])  # 1 at slopes that face right, to the sun
        wander = near * (0.05 + 0.25 * canvas.line(3, 3)[0]) * np.clip(-facing, 0, 1)
        bright = 0.5 + 0.5 * np.tanh((under - wander) / (0.01 + 0.05 * near))
        ripples = np.sin(210 * (under + 0.05 * canvas.noise(5, 3)) / (0.35 + under) ** 0.7)
        bright = bright * (0.88 + 0.12 * facing) + 0.035 * ripples * near
        shadow, lit = np.array((0.42, 0.24, 0.25)), np.array((0.97 - 0.04 * depth, 0.64 - 0.05 * depth, 0.36))
        canvas.paint(canvas.below(crest), shadow + bright[..., None] * (lit - shadow))
        canvas.paint(canvas.below(crest) * np.exp(-under / 0.12) * (1 - near) * 0.6, (1.0, 0.74, 0.48))
        canvas.glow(np.exp(-(((canvas.y - crest) / 0.003) ** 2)) * 0.4, (1.0, 0.75, 0.45))


def mountain_lake(canvas: Canvas) -> None:
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


def aurora_over_cabin(canvas: Canvas) -> None:
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


def sailboat_by_an_island(canvas: Canvas) -> None:
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


def _sailboat(canvas: Canvas, x: float, y: float) -> None:
    """Paint a boat: the hull at the water line (x, y), a mast, two sails and foam at the bow."""

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
