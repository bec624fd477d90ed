"""The motion of the Shapes world: objects that bounce elastically off the walls and pass through each other.

Legend: B objects, F frames. Positions are (x, y) in pixels from the top-left corner, y pointing down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.shapes.scenes import DIRECTIONS, SHAPES, SIZES, Thing, World

FREE_FRAMES = 10  # frames before the first bounce, so that the prompted direction can be seen
CANDIDATES = 128  # starts that are drawn for two objects, to find one in which they begin apart
APART_FRAMES = 8  # first frames in which they stay apart if possible
APART_SHARE = 0.7  # likewise, of all frames


@dataclass(frozen=True)
class ShapesConfig:
    """Geometry of the world."""

    resolution: int = 48
    """Side of the square frame in pixels, at least 16."""
    speed: float = 1.5
    """The distance that the object moves from frame to frame, in pixels."""
    world: World = World.plain
    """plain: one object in flat colours. rich: one or two, eight directions, a random pattern on each surface."""

    def __post_init__(self) -> None:
        if self.resolution < 16:
            raise ValueError(f"resolution={self.resolution} is too small to draw shapes in: use at least 16")
        if not 0 < self.speed <= self.resolution / 8:
            raise ValueError(f"speed={self.speed} must be above 0 and at most resolution / 8 = {self.resolution / 8}")


def trajectories(
    things: Sequence[Thing], num_frames: int, generator: torch.Generator, config: ShapesConfig = ShapesConfig()
) -> Tensor:
    """Return centres [B F 2] that start at random and bounce elastically off the walls.

    A start is in the half opposite to the motion, far enough from the wall for FREE_FRAMES frames without a bounce. On
    an axis without motion it is anywhere.
    """
    device = generator.device
    low, high = bounds(things, config, device)
    room, moves = high - low, _unit_directions(things, device).abs()
    start_room = torch.minimum(room / 2, room - FREE_FRAMES * config.speed * moves).clamp_min(0)
    start_room = torch.where(moves > 0, start_room, room)
    start = torch.rand(len(things), 2, generator=generator, device=device) * start_room
    forward = _unit_directions(things, device) > 0
    return positions(things, torch.where(forward, low + start, high - start), num_frames, config)


def positions(things: Sequence[Thing], starts: Tensor, num_frames: int, config: ShapesConfig) -> Tensor:
    """Return the exact centres [B F 2] of objects that are at `starts` [B 2] in frame 0 and move as prompted."""
    low, high = bounds(things, config, starts.device)
    direction, room = _unit_directions(things, starts.device), (high - low)[:, None]
    forward = (direction > 0)[:, None]
    begun = torch.where(forward, starts[:, None] - low[:, None], high[:, None] - starts[:, None])
    travelled = (
        begun + config.speed * direction.abs()[:, None] * torch.arange(num_frames, device=starts.device)[:, None]
    )
    folded = room - (travelled % (2 * room) - room).abs()
    return torch.where(forward, low[:, None] + folded, high[:, None] - folded)


def pair_trajectories(
    things: Sequence[Thing], num_frames: int, generator: torch.Generator, config: ShapesConfig
) -> Tensor:
    """Return the centres [2 F 2] of the two objects of one scene. They begin apart if there is room for it."""
    drawn = [trajectories([thing] * CANDIDATES, num_frames, generator, config) for thing in things]
    gap = sum(radius(thing, config) for thing in things) + 2
    apart = ((drawn[0] - drawn[1]).norm(dim=-1) > gap).float()  # [CANDIDATES F]
    best = (apart[:, :APART_FRAMES].mean(1) + apart.mean(1).clamp_max(APART_SHARE)).argmax()
    return torch.stack([centres[best] for centres in drawn])


def bounds(things: Sequence[Thing], config: ShapesConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest centre ([B 2] each) for which the object is entirely inside the frame."""
    reach = {  # left/right, up, down, in the shape's own measure
        "circle": (1, 1, 1),
        "square": (1, 1, 1),
        "triangle": (math.sqrt(3) / 2, 1, 1 / 2),
    }
    extents = [[radius(thing, config) * factor for factor in reach[thing.shape]] for thing in things]
    side, up, down = torch.tensor(extents, device=device).unbind(1)
    return torch.stack([side, up], 1), config.resolution - torch.stack([side, down], 1)


def radius(thing: Thing, config: ShapesConfig) -> float:
    """Return the radius of a circle, half the side of a square or the circumradius of a triangle, in pixels."""
    return SHAPES[thing.shape] * SIZES[thing.size] * config.resolution


def _unit_directions(things: Sequence[Thing], device: torch.device) -> Tensor:
    """Return the prompted directions [B 2] as vectors of length 1."""
    directions = torch.tensor([DIRECTIONS[thing.direction] for thing in things], device=device, dtype=torch.float32)
    return directions / directions.norm(dim=1, keepdim=True)
