"""Draws the first images of prompts/i2v.jsonl and prompts/shapes_i2v.jsonl."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from scripts.first_images import nature, sky_and_city
from scripts.first_images.canvas import Canvas
from utils.files import atomic_path, atomic_write_bytes, atomic_write_text, ensure_writable_folder
from utils.frames import to_uint8
from utils.shapes import held_out_scenes, render_clips

WIDTH, HEIGHT = 832, 480
LARGEST_FILE = 60_000  # bytes
SHAPES_STRIDE = 19  # step through the 96 held-out scenes that takes each colour once and each shape twice
PICTURES: tuple[Callable[[Canvas], None], ...] = (
    sky_and_city.moon_over_sea,
    sky_and_city.balloons_over_hills,
    sky_and_city.lighthouse_at_dusk,
    sky_and_city.city_by_the_river,
    nature.dunes_at_sunset,
    nature.mountain_lake,
    nature.aurora_over_cabin,
    nature.sailboat_by_an_island,
)
"""Each image has the name of its function. Its number in this list, from 1, is its seed."""


def run(folder: Path) -> None:
    """Write the images and their lists below the folder."""
    pictures = ensure_writable_folder(folder / "i2v")
    for seed, draw in enumerate(PICTURES, start=1):
        draw(canvas := Canvas(WIDTH, HEIGHT, seed=seed))
        atomic_write_bytes(pictures / f"{draw.__name__}.jpg", jpeg(canvas.finish()))
    draw_shapes(folder)


def jpeg(image: Image.Image) -> bytes:
    """Return the JPEG with the best quality whose file is at most LARGEST_FILE bytes."""
    for quality in range(90, 10, -5):
        image.save(file := io.BytesIO(), "JPEG", quality=quality, optimize=True)
        if file.tell() <= LARGEST_FILE:
            break
    return file.getvalue()


def draw_shapes(folder: Path) -> None:
    """Draw first frames of scenes that the Shapes model was never trained on, and write their list."""
    scenes = held_out_scenes()[::SHAPES_STRIDE]
    frames = to_uint8(render_clips(scenes, 1, torch.Generator().manual_seed(0))[:, 0])
    lines = []
    for scene, pixels in zip(scenes, frames.numpy(), strict=True):
        name = f"shapes_i2v/{scene.size}_{scene.colour}_{scene.shape}.png"
        with atomic_path(folder / name) as path:
            Image.fromarray(pixels).save(path)
        lines.append(json.dumps({"image": name, "prompt": scene.prompt}) + "\n")
    atomic_write_text(folder / "shapes_i2v.jsonl", "".join(lines))
