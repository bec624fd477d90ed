"""The Shapes world: procedural clips of one bouncing object, their prompts, and a detector that measures clips.

Legend: B clips, F frames, H W pixels, K templates. Pixels are in [-1, 1]; positions are (x, y) in pixels from the
top-left corner of the frame, y pointing down; speeds are pixels per frame.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

COLOURS = {  # 8-bit RGB
    "red": (230, 25, 35),
    "green": (0, 200, 60),
    "blue": (35, 70, 250),
    "yellow": (250, 210, 0),
    "purple": (190, 45, 230),
    "cyan": (0, 215, 235),
}
BACKGROUNDS = {"black": (0, 0, 0), "navy": (10, 15, 80), "gray": (110, 110, 110), "white": (255, 255, 255)}
SIZES = {"small": 7 / 48, "large": 10.5 / 48}  # nominal radius as a fraction of the resolution
DIRECTIONS = {"up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1)}
# Circle radius, half side of the square and circumradius of the triangle, in nominal radii. The square has the area of
# the circle; a triangle of that area would leave it too little room to move, so it has 70 % of it.
SHAPES = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "triangle": 1.3}
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}
FREE_FRAMES = 10  # frames before the first bounce, so that the prompted direction can be seen


@dataclass(frozen=True)
class ShapesConfig:
    """Geometry of the world."""

    resolution: int = 48
    """Side of the square frame in pixels, at least 16."""
    speed: float = 1.5
    """The distance that the object moves from frame to frame, in pixels."""

    def __post_init__(self) -> None:
        if self.resolution < 16:
            raise ValueError(f"resolution={self.resolution} is too small to draw shapes in: use at least 16")
        if not 0 < self.speed <= self.resolution / 8:
            raise ValueError(f"speed={self.speed} must be above 0 and at most resolution / 8 = {self.resolution / 8}")


@dataclass(frozen=True)
class Scene:
    """The content of a clip. `prompt` and `from_prompt` are inverse to each other."""

    shape: str
    colour: str
    size: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        for attribute, allowed in ATTRIBUTES.items():
            value = vars(self)[attribute]
            if value not in allowed:
                raise UserError(f"unknown {attribute} {value!r}: use one of {', '.join(allowed)}")

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction} on a {self.background} background"

    @classmethod
    def from_prompt(cls, prompt: str) -> "Scene":
        """Return the scene of a prompt. UserError names an unknown part and the allowed words."""
        thing, ground = r"a (?P<size>\S+) (?P<colour>\S+) (?P<shape>\S+)", r"a (?P<background>\S+) background"
        match = re.fullmatch(rf"{thing} moving (?P<direction>.+) on {ground}", " ".join(prompt.lower().split()))
        if match is None:
            example = all_scenes()[0].prompt
            raise UserError(f"{prompt!r} is not a Shapes prompt: write it like {example!r}")
        return cls(**match.groupdict())


def all_scenes() -> list[Scene]:
    """Return all 576 combinations, in a fixed order."""
    combinations = itertools.product(SHAPES, COLOURS, SIZES, DIRECTIONS, BACKGROUNDS)
    return [Scene(*combination) for combination in combinations]


def is_shapes_prompt(prompt: str) -> bool:
    """Return whether a prompt describes a scene."""
    try:
        Scene.from_prompt(prompt)
    except UserError:
        return False
    return True


def shapes_words() -> set[str]:
    """Return the words of all prompts."""
    return {word for scene in all_scenes() for word in scene.prompt.split()}


def held_out_scenes() -> list[Scene]:
    """Return the 96 combinations that are never trained on. Every attribute value occurs equally often in them."""
    return [scene for scene in all_scenes() if _is_held_out(scene)]


def training_scenes() -> list[Scene]:
    """Return the 480 combinations that are not held out."""
    return [scene for scene in all_scenes() if not _is_held_out(scene)]


def _is_held_out(scene: Scene) -> bool:
    """One colour for each combination of the others; 2 shape + 3 size covers Z/6 once, so colours are balanced."""
    index = {name: list(allowed).index(vars(scene)[name]) for name, allowed in ATTRIBUTES.items()}
    total = 2 * index["shape"] + 3 * index["size"] + index["colour"] + index["direction"] + index["background"]
    return total % len(COLOURS) == 0


def render_clips(
    scenes: Sequence[Scene], num_frames: int, generator: torch.Generator, config: ShapesConfig = ShapesConfig()
) -> Tensor:
    """Render clips [B F 3 H W] in [-1, 1], float32, on the device of the generator, which draws the starts."""
    return render_at(scenes, trajectories(scenes, num_frames, generator, config), config)


def trajectories(
    scenes: Sequence[Scene], num_frames: int, generator: torch.Generator, config: ShapesConfig = ShapesConfig()
) -> Tensor:
    """Return centres [B F 2] that start at random and bounce elastically off the walls.

    A start is in the half opposite to the motion, far enough from the wall for FREE_FRAMES frames without a bounce.
    """
    device = generator.device
    low, high = bounds(scenes, config, device)
    room, velocity = high - low, config.speed / math.sqrt(2)
    start_room = torch.minimum(room / 2, room - FREE_FRAMES * velocity).clamp_min(0)
    start = torch.rand(len(scenes), 2, generator=generator, device=device) * start_room
    travelled = start[:, None] + velocity * torch.arange(num_frames, device=device)[:, None]
    room = room[:, None]
    folded = room - (travelled % (2 * room) - room).abs()
    forward = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], device=device)[:, None] > 0
    return torch.where(forward, low[:, None] + folded, high[:, None] - folded)


def bounds(scenes: Sequence[Scene], config: ShapesConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest centre ([B 2] each) for which the object is entirely inside the frame."""
    reach = {  # left/right, up, down, in the shape's own measure
        "circle": (1, 1, 1),
        "square": (1, 1, 1),
        "triangle": (math.sqrt(3) / 2, 1, 1 / 2),
    }
    extents = [[radius(scene, config) * factor for factor in reach[scene.shape]] for scene in scenes]
    side, up, down = torch.tensor(extents, device=device).unbind(1)
    return torch.stack([side, up], 1), config.resolution - torch.stack([side, down], 1)


def radius(scene: Scene, config: ShapesConfig) -> float:
    """Return the radius of a circle, half the side of a square or the circumradius of a triangle, in pixels."""
    return SHAPES[scene.shape] * SIZES[scene.size] * config.resolution


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


FOREGROUND_CONTRAST = 0.45  # RGB distance from the background; the closest colour and background are 1.18 apart
COLOUR_TOLERANCE = 0.75  # RGB distance from the nearest palette colour; less than the 1.18 between the closest two
BACKGROUND_TOLERANCE = 0.5  # likewise; black and navy are 0.64 apart
AREA_TOLERANCE = 1.5  # factor beyond the smallest and largest object's area
STRAY_TOLERANCE = 0.15  # foreground apart from the object, in object areas
OVERLAP_TOLERANCE = 0.6  # soft intersection over union with the best template, below which the object is in pieces
DIRECTION_TOLERANCE = 30.0  # degrees
SPEED_TOLERANCE = 0.2  # of the configured speed
PATH_WINDOW = 5  # frames over which a path is compared with a straight line; bounces on one axis are further apart
FRAME_ATTRIBUTES = ("present", "colour", "shape", "size", "background")


@dataclass(frozen=True)
class Measurement:
    """A clip compared with its scene. In a frame without the object, colour, shape and size are wrong too."""

    present: Tensor  # [F] bool: one object in one piece, of plausible area
    colour: Tensor  # [F] bool
    shape: Tensor  # [F] bool
    size: Tensor  # [F] bool
    background: Tensor  # [F] bool
    deviation: Tensor  # [F] pixels off a path that is straight between bounces; NaN where the object is missing
    direction: bool  # within DIRECTION_TOLERANCE before the first bounce
    direction_error_degrees: float  # 180 if the object stands still or cannot be followed
    straightness: float  # rms deviation in pixels (0 is perfect); NaN if the object cannot be followed
    smooth: bool  # rms deviation below a third of a frame's travel, and never above a whole one
    speed: float  # measured speed over the configured one

    @property
    def all_right(self) -> bool:
        """True if the direction is right, and every other attribute is right in at least 90 % of the frames."""
        fractions = [getattr(self, name).float().mean().item() for name in FRAME_ATTRIBUTES]
        return self.direction and min(fractions) >= 0.9


@dataclass(frozen=True)
class _Objects:
    """The foreground object of each frame."""

    background: Tensor  # [F 3]
    colour: Tensor  # [F 3], NaN in a frame without foreground
    alpha: Tensor  # [F H W] in [0, 1]: how much of a pixel the object covers
    centroid: Tensor  # [F 2]
    stray: Tensor  # [F] pixels of foreground apart from the object


def measure(clip: Tensor, scene: Scene, config: ShapesConfig = ShapesConfig()) -> Measurement:
    """Compare a clip [F 3 H W] in [-1, 1] with the scene that it should show. The result is on the CPU."""
    if clip.ndim != 4 or clip.shape[1:] != (3, config.resolution, config.resolution):
        raise ValueError(f"clip has shape {tuple(clip.shape)}: expected [F 3 {config.resolution} {config.resolution}]")
    clip = clip.detach().float().cpu()
    objects = _find_objects(clip)
    kinds = list(itertools.product(SHAPES, SIZES))
    present, best = _match_templates(objects, kinds, config)
    is_shape = torch.tensor([shape == scene.shape for shape, _ in kinds])
    is_size = torch.tensor([size == scene.size for _, size in kinds])
    return Measurement(
        present=present,
        colour=present & _is_named(objects.colour, COLOURS, scene.colour, COLOUR_TOLERANCE),
        shape=present & is_shape[best],
        size=present & is_size[best],
        background=_is_named(objects.background, BACKGROUNDS, scene.background, BACKGROUND_TOLERANCE),
        **_measure_path(objects.centroid, present, scene, config),
    )


def _find_objects(clip: Tensor) -> _Objects:
    """Separate each frame [F 3 H W] into background and largest connected object."""
    background = clip.flatten(2).median(-1).values
    difference = clip - background[..., None, None]
    foreground = difference.square().sum(1) > FOREGROUND_CONTRAST**2
    blob = _largest_component(foreground)
    core = ~_dilate(~blob, 1)  # away from the blended edge
    core = torch.where(core.any((1, 2), keepdim=True), core, blob)
    colour = clip.masked_fill(~core[:, None], math.nan).flatten(2).nanmedian(-1).values
    axis = (colour - background).nan_to_num()[..., None, None]
    near = _dilate(blob, 2)
    alpha = (difference * axis).sum(1) / axis.square().sum(1).clamp_min(1e-6)
    alpha = alpha.clamp(0, 1) * near
    pixels = torch.arange(clip.shape[-1]) + 0.5
    mass = torch.stack([(alpha.sum(1) * pixels).sum(1), (alpha.sum(2) * pixels).sum(1)], 1)
    centroid = mass / alpha.sum((1, 2)).clamp_min(1e-6)[:, None]
    return _Objects(background, colour, alpha, centroid, (foreground & ~near).sum((1, 2)))


def _match_templates(objects: _Objects, kinds: list[tuple[str, str]], config: ShapesConfig) -> tuple[Tensor, Tensor]:
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


def _dilate(mask: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def _largest_component(mask: Tensor) -> Tensor:
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


def _is_named(values: Tensor, palette: dict[str, tuple[int, int, int]], name: str, tolerance: float) -> Tensor:
    """Return [F] bool: True if the palette colour nearest to a value [F 3] is the named one, and near enough."""
    distance, nearest = torch.cdist(values, pixel_values(list(palette.values()))).min(1)
    return (nearest == list(palette).index(name)) & (distance < tolerance)


def _measure_path(centroid: Tensor, present: Tensor, scene: Scene, config: ShapesConfig) -> dict:
    """Return the path fields of a Measurement from centroids [F 2]. Only frames with an object count."""
    frames = present.nonzero()[:, 0]
    if len(frames) < PATH_WINDOW:
        deviation = torch.full_like(centroid[:, 0], math.nan)
        path = {"direction": False, "direction_error_degrees": 180.0, "straightness": math.nan, "smooth": False}
        return {"deviation": deviation, "speed": 0.0, **path}
    first, last = frames[0].item(), frames[-1].item() + 1
    track = _fill_gaps(centroid[first:last], present[first:last])
    deviation = _deviation(track, config.speed)
    deviation = F.pad(deviation, (first, len(present) - last)).masked_fill(~present, math.nan)
    straightness = deviation.square().nanmean().sqrt().item()
    error = _direction_error(track, scene, config.speed)
    drift = ((track[4:] - track[:-4]).abs() / 4).median(0).values  # per axis; the few bounces do not move a median
    return {
        "deviation": deviation,
        "direction": error <= DIRECTION_TOLERANCE,
        "direction_error_degrees": error,
        "straightness": straightness,
        "smooth": straightness <= config.speed / 3 and deviation.nan_to_num().max().item() <= config.speed,
        "speed": drift.norm().item() / config.speed,
    }


def _fill_gaps(track: Tensor, known: Tensor) -> Tensor:
    """Interpolate a track [F 2] linearly between its known frames [F]. The first and the last frame are known."""
    time = torch.arange(len(track))
    before = torch.where(known, time, 0).cummax(0).values
    after = torch.where(known, time, len(track)).flip(0).cummin(0).values.flip(0)
    weight = (time - before) / (after - before).clamp_min(1)
    return torch.lerp(track[before], track[after], weight[:, None])


def _deviation(track: Tensor, speed: float) -> Tensor:
    """Return the distance in pixels, [F], of a track [F 2] from straight motion between bounces.

    Each axis of each frame uses the best straight line of all windows that contain it. So a bounce, with straight
    motion on both sides, does not count. Neither would a jump, so steps beyond twice the speed add their excess.
    """
    time = torch.arange(PATH_WINDOW, dtype=track.dtype)
    basis = torch.linalg.qr(torch.stack([torch.ones_like(time), time], 1)).Q
    windows = track.unfold(0, PATH_WINDOW, 1)  # [windows 2 PATH_WINDOW]
    residual = (windows - windows @ basis @ basis.T).square().mean(-1).sqrt()
    padded = F.pad(residual.T, (PATH_WINDOW - 1, PATH_WINDOW - 1), value=math.inf)
    bent = -F.max_pool1d(-padded, PATH_WINDOW, stride=1).norm(dim=0)
    steps = (track[1:] - track[:-1]).norm(dim=1)
    return torch.maximum(bent.abs(), F.pad((steps - 2 * speed).clamp_min(0), (1, 0)))


def _direction_error(track: Tensor, scene: Scene, speed: float) -> float:
    """Return the degrees between the scene's direction and a line through the track [F 2] before its first bounce."""
    ahead = (track[3:] - track[:-3]) * (track[4] - track[0]).sign()
    turned = (ahead < -speed).any(1).nonzero()[:, 0]  # the bounce lies within the next frame
    track = track[: max(turned[0].item() + 1, 5)] if len(turned) else track
    time = torch.arange(len(track), dtype=track.dtype)
    time = time - time.mean()
    velocity = time @ track / time.square().sum()
    if velocity.norm() < speed / 4:
        return 180.0
    wanted = torch.tensor(DIRECTIONS[scene.direction], dtype=track.dtype)
    return math.degrees(math.acos(F.cosine_similarity(velocity, wanted, dim=0).clamp(-1, 1).item()))


def summarise(measurements: Sequence[Measurement], fps: float) -> dict:
    """Return a JSON-ready table of fractions over all clips. "seconds" has the per-frame ones second by second."""
    frames = {name: torch.cat([getattr(m, name) for m in measurements]).float() for name in FRAME_ATTRIBUTES}
    deviation = torch.cat([m.deviation for m in measurements])
    second = torch.cat([torch.arange(len(m.present)) // fps for m in measurements])
    clips = {
        "direction": [m.direction for m in measurements],
        "smooth": [m.smooth for m in measurements],
        "speed": [abs(m.speed - 1) <= SPEED_TOLERANCE for m in measurements],
        "all_right": [m.all_right for m in measurements],
    }
    return {
        "clips": len(measurements),
        "frames": len(second),
        **{name: values.mean().item() for name, values in frames.items()},
        **{name: sum(values) / len(values) for name, values in clips.items()},
        "straightness_pixels": _rms(deviation),
        "speed_ratio": sum(m.speed for m in measurements) / len(measurements),
        "seconds": [
            {
                "second": int(value),
                "frames": int((second == value).sum()),
                **{name: values[second == value].mean().item() for name, values in frames.items()},
                "straightness_pixels": _rms(deviation[second == value]),
            }
            for value in second.unique().tolist()
        ],
    }


def _rms(deviation: Tensor) -> float | None:
    """Return the root mean square of the values that are not NaN; None if all are NaN."""
    return None if deviation.isnan().all() else deviation.square().nanmean().sqrt().item()
