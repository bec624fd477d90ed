"""Pictures of the Shapes world: objects with edges one pixel wide on a background.

Legend: B clips, F frames, H W pixels. Pixels are in [-1, 1].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.shapes.patterns import GROUND_PERIODS, OBJECT_PERIODS, Pattern, draw_pattern, other_shade, shade
from utils.shapes.physics import ShapesConfig, pair_trajectories, radius, trajectories
from utils.shapes.scenes import BACKGROUNDS, COLOURS, Scene, World


def render_clips(
    scenes: Sequence[Scene], num_frames: int, generator: torch.Generator, config: ShapesConfig = ShapesConfig()
) -> Tensor:
    """Render clips [B F 3 H W] in [-1, 1], float32, on the device of the generator, which draws the starts.

    In the rich world it draws the patterns too.

    Raises:
        ValueError: a scene with two objects in the plain world.
    """
    if config.world is World.rich:
        return torch.stack([_render_rich(scene, num_frames, generator, config) for scene in scenes])
    if any(scene.second is not None for scene in scenes):
        raise ValueError("the plain world has one object in a scene: use ShapesConfig(world=World.rich)")
    return render_at(scenes, trajectories(scenes, num_frames, generator, config), config)


def _render_rich(scene: Scene, num_frames: int, generator: torch.Generator, config: ShapesConfig) -> Tensor:
    """Draw starts and patterns, and render one clip [F 3 H W]."""
    if scene.second is None:
        centres = trajectories(scene.things, num_frames, generator, config)
    else:
        centres = pair_trajectories(scene.things, num_frames, generator, config)
    patterns = [draw_pattern(OBJECT_PERIODS, config.resolution, generator) for _ in scene.things]
    ground = draw_pattern(GROUND_PERIODS, config.resolution, generator)
    return render_patterned(scene, centres, patterns, ground, config)


def render_patterned(
    scene: Scene, centres: Tensor, patterns: Sequence[Pattern], ground: Pattern, config: ShapesConfig
) -> Tensor:
    """Render one clip [F 3 H W] of a scene with given centres [objects F 2] and patterns, the front object last."""
    pixels = torch.arange(config.resolution, device=centres.device) + 0.5
    base = BACKGROUNDS[scene.background]
    middle = config.resolution / 2
    surface = shade(ground, pixels[None, :] - middle, pixels[:, None] - middle)
    frames = _paint(surface, base, other_shade(base, ground=True)).expand(centres.shape[1], -1, -1, -1)
    for thing, path, pattern in reversed(list(zip(scene.things, centres, patterns, strict=True))):
        radii = torch.tensor([radius(thing, config)], device=centres.device)
        alpha = coverage([thing.shape], radii, path[None], config.resolution)[0, :, None]
        x, y = (pixels - path[:, axis, None] for axis in (0, 1))
        base = COLOURS[thing.colour]
        painted = _paint(shade(pattern, x[:, None, :], y[:, :, None]), base, other_shade(base, ground=False))
        frames = torch.lerp(frames, painted, alpha)
    return frames


def _paint(surface: Tensor, base: tuple[int, int, int], other: tuple[int, int, int]) -> Tensor:
    """Mix two 8-bit colours by shades [... H W]: pixels [... 3 H W] in [-1, 1]."""
    first, second = pixel_values([base, other], surface.device)[..., None, None]
    return first + surface.unsqueeze(-3) * (second - first)


def render_at(scenes: Sequence[Scene], centres: Tensor, config: ShapesConfig = ShapesConfig()) -> Tensor:
    """Render clips [B F 3 H W] in [-1, 1] with the scenes' objects at given centres [B F 2]."""
    radii = torch.tensor([radius(scene, config) for scene in scenes], device=centres.device)
    alpha = coverage([scene.shape for scene in scenes], radii, centres, config.resolution)[:, :, None]
    colour = pixel_values([COLOURS[scene.colour] for scene in scenes], centres.device)[:, None, :, None, None]
    background = pixel_values([BACKGROUNDS[scene.background] for scene in scenes], centres.device)
    background = background[:, None, :, None, None]
    return torch.addcmul(background, alpha, colour - background)


def coverage(shapes: Sequence[str], radii: Tensor, centres: Tensor, resolution: int) -> Tensor:
    """Return the share of each pixel that an object covers, [B F H W] in [0, 1]. The edge is one pixel wide."""
    pixels = torch.arange(resolution, device=centres.device) + 0.5
    dx = (pixels - centres[..., :1])[..., None, :]
    dy = (pixels - centres[..., 1:])[..., :, None]
    inside = []
    for shape, r, x, y in zip(shapes, radii, dx, dy, strict=True):
        if shape == "circle":
            distance = (x.square() + y.square()).sqrt() - r
        elif shape == "square":
            distance = torch.maximum(x.abs(), y.abs()) - r
        else:  # pointing up, the centre is its centroid
            distance = torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - r / 2
        inside.append(distance)
    return (0.5 - torch.stack(inside)).clamp_(0, 1)


def pixel_values(rgb: Sequence[tuple[int, int, int]], device: torch.device | None = None) -> Tensor:
    """Convert 8-bit colours to values in [-1, 1], [N 3]."""
    return torch.tensor(rgb, dtype=torch.float32, device=device) / 127.5 - 1
