"""The detector of the rich Shapes world: one or two objects with patterns, on a background with a pattern.

A surface has two colours, so its pixels lie on a line in RGB. Objects are told apart by the line that is nearer.

Legend: F frames, H W pixels, P points of a patch, S surfaces. Pixels are in [-1, 1].
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.shapes.detector import (
    BACKGROUND_TOLERANCE,
    COLOUR_TOLERANCE,
    FOREGROUND_CONTRAST,
    Objects,
    centroids,
    core_of,
    dilate,
    largest_component,
    match_templates,
)
from utils.shapes.measurement import Measurement
from utils.shapes.paths import measure_path
from utils.shapes.patterns import other_shade
from utils.shapes.physics import ShapesConfig, radius
from utils.shapes.rendering import pixel_values
from utils.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

TOUCH = 1  # pixels; objects nearer than twice this are not judged
LONGEST_HIDDEN = 12  # frames for which the object behind may be out of sight
REFERENCE_FRAMES = 4  # judged frames whose mean is the pattern to keep
FLAT = 0.12  # standard deviation of shades, below which a surface has no pattern
KEPT_CORRELATION = 0.6  # of shades with those of the first frames


@dataclass(frozen=True)
class _Lines:
    """The pairs of colours of surfaces."""

    names: tuple[str, ...]
    start: Tensor  # [S 3]
    along: Tensor  # [S 3]

    def shades(self, pixels: Tensor) -> Tensor:
        """Return the nearest shade on each line for pixels [... 3]: [... S] in [0, 1]."""
        return ((pixels[..., None, :] - self.start) * self.along).sum(-1).div(self.along.square().sum(-1)).clamp(0, 1)

    def distances(self, pixels: Tensor) -> Tensor:
        """Return the RGB distance of pixels [... 3] from each line: [... S]."""
        nearest = self.start + self.shades(pixels)[..., None] * self.along
        return (pixels[..., None, :] - nearest).norm(dim=-1)


def _lines(palette: dict[str, tuple[int, int, int]], *, ground: bool) -> _Lines:
    start = pixel_values(list(palette.values()))
    end = pixel_values([other_shade(rgb, ground=ground) for rgb in palette.values()])
    return _Lines(tuple(palette), start, end - start)


@dataclass(frozen=True)
class _Layers:
    """A clip taken apart."""

    pixels: Tensor  # [F H W 3]
    background: Tensor  # [F] index of the nearest background
    background_distance: Tensor  # [F] RGB distance of the median pixel from it
    away: Tensor  # [F H W] RGB distance from the background
    foreground: Tensor  # [F H W] bool


def measure_rich(clip: Tensor, scene: Scene, config: ShapesConfig) -> Measurement:
    """Compare a clip [F 3 H W] in [-1, 1] with its scene. The result is on the CPU."""
    layers = _take_apart(clip)
    found = [_find_thing(layers, scene, index) for index in range(len(scene.things))]
    blobs = [blob for blob, _ in found]
    judged = torch.ones(len(clip), dtype=torch.bool) if len(blobs) == 1 else _apart(*blobs)
    parts = [
        _measure_thing(layers, objects, thing, judged, config)
        for (_, objects), thing in zip(found, scene.things, strict=True)
    ]
    grounds = list(BACKGROUNDS)
    right_ground = layers.background == grounds.index(scene.background)
    texture = _ground_kept(layers, torch.stack(blobs).any(0))
    for part in parts:
        texture = texture & part.pop("texture")
    joined = {
        name: torch.stack([part[name] for part in parts]).all(0) for name in ("present", "colour", "shape", "size")
    }
    return Measurement(
        **joined,
        background=right_ground & (layers.background_distance < BACKGROUND_TOLERANCE),
        texture=texture,
        judged=judged,
        paths=tuple(part["track"] for part in parts),
        **_worse([part["path"] for part in parts]),
    )


def _take_apart(clip: Tensor) -> _Layers:
    lines = _lines(BACKGROUNDS, ground=True)
    pixels = clip.movedim(1, -1)
    distance, background = lines.distances(pixels.flatten(1, 2).median(1).values).min(-1)
    away = lines.distances(pixels).gather(-1, background[:, None, None, None].expand(*pixels.shape[:3], 1))[..., 0]
    return _Layers(pixels, background, distance, away, away > FOREGROUND_CONTRAST)


def _find_thing(layers: _Layers, scene: Scene, index: int) -> tuple[Tensor, Objects]:
    """Return the region of an object, [F H W] bool, and the object itself. With two, its colour tells it apart."""
    lines, mask, others = _lines(COLOURS, ground=False), layers.foreground, torch.zeros_like(layers.foreground)
    distances = lines.distances(layers.pixels)  # [F H W S]
    if scene.second is not None:
        own, other = (lines.names.index(scene.things[place].colour) for place in (index, 1 - index))
        mine = distances[..., own] <= distances[..., other]
        mask, others = layers.foreground & mine, _opened(layers.foreground & ~mine)
        mask = _opened(mask)
    blob = largest_component(mask)
    core = core_of(blob)
    colour = layers.pixels.masked_fill(~core[..., None], math.nan).flatten(1, 2).nanmedian(1).values
    nearest = lines.distances(colour.nan_to_num()).argmin(-1)
    off = distances.gather(-1, nearest[:, None, None, None].expand(*distances.shape[:3], 1))[..., 0]
    near = dilate(blob, 2)
    alpha = torch.where(core, 1.0, layers.away / (layers.away + off).clamp_min(1e-6)) * (near & ~others)
    stray = (layers.foreground & ~near & ~dilate(others, 2)).sum((1, 2))
    return blob, Objects(layers.background, colour, alpha, centroids(alpha), stray)


def _opened(mask: Tensor) -> Tensor:
    """Remove what is thinner than three pixels, such as the blended rim of an object."""
    return mask & dilate(~dilate(~mask, 1), 1)


def _apart(front: Tensor, behind: Tensor) -> Tensor:
    """Return [F] bool: True unless the regions [F H W] touch, or one is out of sight after it touched the other."""
    touching = (dilate(front, TOUCH) & dilate(behind, TOUCH)).any(2).any(1)
    gone = ~(front.any(2).any(1) & behind.any(2).any(1))
    hidden, frames, start = touching.clone(), len(touching), 0
    while start < frames:
        end = start
        while end < frames and gone[end]:
            end += 1
        returns = end == frames or touching[end]
        if 0 < start < end <= start + LONGEST_HIDDEN and touching[start - 1] and returns:
            hidden[start:end] = True
        start = end + 1
    return ~hidden


def _measure_thing(layers: _Layers, objects: Objects, thing: Thing, judged: Tensor, config: ShapesConfig) -> dict:
    """Return the columns of one object, its path and its track."""
    kinds = list(itertools.product(SHAPES, SIZES))
    present, best = match_templates(objects, kinds, config)
    lines = _lines(COLOURS, ground=False)
    distance, nearest = lines.distances(objects.colour.nan_to_num()).min(-1)
    followed = present & judged
    return {
        "present": present,
        "colour": present & (nearest == lines.names.index(thing.colour)) & (distance < COLOUR_TOLERANCE),
        "shape": present & torch.tensor([shape == thing.shape for shape, _ in kinds])[best],
        "size": present & torch.tensor([size == thing.size for _, size in kinds])[best],
        "texture": present & _object_kept(layers, objects, thing, followed, config),
        "track": objects.centroid.masked_fill(~followed[:, None], math.nan),
        "path": measure_path(objects.centroid, followed, thing, config, hidden=~judged),
    }


def _worse(paths: Sequence[dict]) -> dict:
    """Join the path fields of the objects into those of a Measurement."""
    deviations = torch.stack([path["deviation"] for path in paths])
    worst = max(paths, key=lambda path: (math.isnan(path["straightness"]), path["straightness"]))
    return {
        "deviation": torch.where(deviations.isnan().all(0), math.nan, deviations.nan_to_num(-1).amax(0)),
        "direction": all(path["direction"] for path in paths),
        "direction_error_degrees": max(path["direction_error_degrees"] for path in paths),
        "straightness": worst["straightness"],
        "smooth": all(path["smooth"] for path in paths),
        "speed": max((path["speed"] for path in paths), key=lambda speed: abs(speed - 1)),
    }


def _object_kept(layers: _Layers, objects: Objects, thing: Thing, followed: Tensor, config: ShapesConfig) -> Tensor:
    """Return [F] bool: True if the object has the pattern of its first frames, at the same place on it."""
    inner = radius(thing, config) * (0.5 if thing.shape == "triangle" else 1.0) - 1
    steps = torch.arange(-math.floor(inner), math.floor(inner) + 1.0)
    y, x = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    inside = x.square() + y.square() <= inner**2
    offsets = torch.stack([x, y], 1)[inside]
    grid = (objects.centroid[:, None] + offsets) * (2 / layers.pixels.shape[1]) - 1  # [F P 2]
    patch = F.grid_sample(layers.pixels.movedim(-1, 1), grid[:, None], align_corners=False)[:, :, 0].movedim(1, -1)
    lines = _lines(COLOURS, ground=False)
    shades = lines.shades(patch)[..., lines.names.index(thing.colour)]
    return _kept(shades, torch.ones_like(shades, dtype=torch.bool), followed)


def _ground_kept(layers: _Layers, objects: Tensor) -> Tensor:
    """Return [F] bool: True if the background has the pattern of the first frames, beside the objects [F H W]."""
    lines = _lines(BACKGROUNDS, ground=True)
    first = layers.background[0]
    shades = lines.shades(layers.pixels)[..., first].flatten(1)
    free = ~dilate(objects | layers.foreground, 3)
    return _kept(shades, free.flatten(1), free.flatten(1).any(1))


def _kept(shades: Tensor, known: Tensor, usable: Tensor) -> Tensor:
    """Compare shades [F P], where `known`, with their mean over the first usable frames: [F] bool.

    A pattern is kept if it correlates with the first frames. A flat surface is kept if it stays flat.
    """
    first = usable.nonzero()[:REFERENCE_FRAMES, 0]
    if len(first) == 0:
        return torch.zeros_like(usable)
    weight = known[first].float()
    reference = (shades[first] * weight).sum(0) / weight.sum(0).clamp_min(1)
    common = (known & (weight.sum(0) > 0)).float()
    count = common.sum(1).clamp_min(1)
    mean, mean_first = (shades * common).sum(1) / count, (reference * common).sum(1) / count
    now, then = (shades - mean[:, None]) * common, (reference - mean_first[:, None]) * common
    deviation, deviation_first = ((part.square().sum(1) / count).sqrt() for part in (now, then))
    correlation = (now * then).sum(1) / count / (deviation * deviation_first).clamp_min(1e-6)
    flat = deviation_first < FLAT
    return torch.where(flat, deviation < 2 * FLAT, (correlation > KEPT_CORRELATION) & (deviation > FLAT / 2))
