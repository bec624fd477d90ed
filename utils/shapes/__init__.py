"""The Shapes world: procedural clips of bouncing objects, their prompts, and a detector that measures clips.

Legend: B clips, F frames, H W pixels. Pixels are in [-1, 1]; positions are (x, y) in pixels from the top-left corner of
the frame, y pointing down; speeds are pixels per frame.
"""

from utils.shapes.measurement import FRAME_ATTRIBUTES, Measurement, summarise
from utils.shapes.measuring import measure
from utils.shapes.physics import FREE_FRAMES, ShapesConfig, bounds, positions, trajectories
from utils.shapes.rendering import render_at, render_clips
from utils.shapes.scenes import (
    ATTRIBUTES,
    Scene,
    Thing,
    World,
    all_scenes,
    held_out_scenes,
    is_shapes_prompt,
    shapes_words,
    training_scenes,
)

__all__ = [
    "ATTRIBUTES",
    "FRAME_ATTRIBUTES",
    "FREE_FRAMES",
    "Measurement",
    "Scene",
    "ShapesConfig",
    "Thing",
    "World",
    "all_scenes",
    "bounds",
    "held_out_scenes",
    "is_shapes_prompt",
    "measure",
    "positions",
    "render_at",
    "render_clips",
    "shapes_words",
    "summarise",
    "training_scenes",
    "trajectories",
]
