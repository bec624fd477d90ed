"""The detector of the plain Shapes world: it finds the object in every frame and compares it with the prompt.

Legend: F frames, H W pixels, K templates. Pixels are in [-1, 1].
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.shapes.measurement import Measurement
from utils.shapes.paths import measure_path
from utils.shapes.physics import ShapesConfig
from utils.shapes.rendering import coverage, pixel_values
from utils.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

FOREGROUND_CONTRAST = 0.45  # RGB distance from the background; the closest colour and background are 1.18 apart
COLOUR_TOLERANCE = 0.75  # RGB distance from the nearest palette colour; less than the 1.18 between the closest two
BACKGROUND_TOLERANCE = 0.5  # likewise; black and navy are 0.64 apart
AREA_TOLERANCE = 1.5  # factor beyond the smallest and largest object's area
STRAY_TOLERANCE = 0.15  # foreground apart from the object, in object areas
OVERLAP_TOLERANCE = 0.6  # soft intersection over union with the best template, below which the object is in pieces


@dataclass(frozen=True)
class Objects:
    """The foreground object of each frame."""

    background: Tensor  # [F 3]
    colour: Tensor  # [F 3], NaN in a frame without foreground
    alpha: Tensor  # [F H W] in [0, 1]: how much of a pixel the object covers
    centroid: Tensor  # [F 2]
    stray: Tensor  # [F] pixels of foreground apart from the object


def measure_plain(clip: Tensor, scene: Scene, config: ShapesConfig) -> Measurement:
    """Compare a clip [F 3 H W] in [-1, 1] with the scene that it should show. The result is on the CPU."""
    objects = _find_objects(clip)
    kinds = list(itertools.product(SHAPES, SIZES))
    present, best = match_templates(objects, kinds, config)
    is_shape = torch.tensor([shape == scene.shape for shape, _ in kinds])
    is_size = torch.tensor([size == scene.size for _, size in kinds])
    return Measurement(
        present=present,
        colour=present & is_named(objects.colour, COLOURS, scene.colour, COLOUR_TOLERANCE),
        shape=present & is_shape[best],
        size=present & is_size[best],
        background=is_named(objects.background, BACKGROUNDS, scene.background, BACKGROUND_TOLERANCE),
        paths=(objects.centroid.masked_fill(~present[:, None], math.nan),),
        **measure_path(objects.centroid, present, scene, config),
    )


def _find_objects(clip: Tensor) -> Objects:
    """Separate each frame [F 3 H W] into background and largest connected object."""
    background = clip.flatten(2).median(-1).values
    difference = clip - background[..., None, None]
    foreground = difference.square().sum(1) > FOREGROUND_CONTRAST**2
    blob = largest_component(foreground)
    core = core_of(blob)
    colour = clip.masked_fill(~core[:, None], math.nan).flatten(2).nanmedian(-1).values
    axis = (colour - background).nan_to_num()[..., None, None]
    near = dilate(blob, 2)
    alpha = (difference * axis).sum(1) / axis.square().sum(1).clamp_min(1e-6)
    alpha = alpha.clamp(0, 1) * near
    return Objects(background, colour, alpha, centroids(alpha), (foreground & ~near).sum((1, 2)))


def match_templates(objects: Objects, kinds: list[tuple[str, str]], config: ShapesConfig) -> tuple[Tensor, Tensor]:
    """Return for each frame whether it has one whole object, [F] bool, and the index of the nearest kind, [F]."""
    radii = torch.tensor([SHAPES[shape] * SIZES[size] * config.resolution for shape, size in kinds])
    centres = objects.centroid.expand(len(kinds), -1, -1)
    templates = coverage([shape for shape, _ in kinds], radii, centres, config.resolution)  # [K F H W]
    overlaps = torch.minimum(templates, objects.alpha).sum((2, 3)) / torch.maximum(templates, objects.alpha).sum((2, 3))
    overlap, best = overlaps.max(0)
    areas, area = templates.sum((2, 3)), objects.alpha.sum((1, 2))
    plausible = (area > areas.amin(0) / AREA_TOLERANCE) & (area < areas.amax(0) * AREA_TOLERANCE)
    whole = (objects.stray < STRAY_TOLERANCE * area) & (overlap > OVERLAP_TOLERANCE)
    return plausible & whole, best


def core_of(blob: Tensor) -> Tensor:
    """Return the inside of each region [F H W], away from its blended edge. A thin region is returned whole."""
    core = ~dilate(~blob, 1)
    return torch.where(core.any((1, 2), keepdim=True), core, blob)


def centroids(alpha: Tensor) -> Tensor:
    """Return the centre of mass of each square frame [F H W]: (x, y) in pixels, [F 2]."""
    pixels = torch.arange(alpha.shape[-1]) + 0.5
    mass = torch.stack([(alpha.sum(1) * pixels).sum(1), (alpha.sum(2) * pixels).sum(1)], 1)
    return mass / alpha.sum((1, 2)).clamp_min(1e-6)[:, None]


def dilate(mask: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def largest_component(mask: Tensor) -> Tensor:
    """Return the largest connected component of each mask [F H W]. For speed it uses cells of 2x2 pixels."""
    cells = F.max_pool2d(mask[:, None].float(), 2, ceil_mode=True)
    labels = torch.arange(1.0, cells[0].numel() + 1).view(cells.shape[1:]) * cells
    while not torch.equal(spread := F.max_pool2d(labels, 3, stride=1, padding=1) * cells, labels):
        labels = spread  # the highest label of a component reaches all of it
    counts = torch.zeros(len(mask), cells[0].numel() + 1)
    counts.scatter_add_(1, labels.long().flatten(1), cells.flatten(1))
    largest = labels == counts.argmax(1)[:, None, None, None]
    largest = largest[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2)
    return mask & largest[:, : mask.shape[1], : mask.shape[2]]


def is_named(values: Tensor, palette: dict[str, tuple[int, int, int]], name: str, tolerance: float) -> Tensor:
    """Return [F] bool: True if the palette colour nearest to a value [F 3] is the named one, and near enough."""
    distance, nearest = torch.cdist(values, pixel_values(list(palette.values()))).min(1)
    return (nearest == list(palette).index(name)) & (distance < tolerance)
