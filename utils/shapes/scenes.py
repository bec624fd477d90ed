"""The scenes of the Shapes world, and the prompts that name them. Two worlds share one grammar.

The plain world has one object that moves along a diagonal. The rich world has one or two objects, eight directions, and
a pattern on each surface that no prompt names.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

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
DIAGONALS = {"up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1)}
DIRECTIONS = DIAGONALS | {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
# Circle radius, half side of the square and circumradius of the triangle, in nominal radii. The square has the area of
# the circle; a triangle of that area would leave it too little room to move, so it has 70 % of it.
SHAPES = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "triangle": 1.3}
# The values of the plain world. The rich one has all directions.
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "direction": DIAGONALS, "background": BACKGROUNDS}
WORDS = ATTRIBUTES | {"direction": DIRECTIONS}  # what a prompt may say
PARTNERS = 2  # the scenes with two objects in the rich world, for each scene with one


class World(Enum):
    """Which scenes there are, and how their surfaces look."""

    plain = "plain"
    rich = "rich"


@dataclass(frozen=True)
class Thing:
    """One object."""

    shape: str
    colour: str
    size: str
    direction: str

    def __post_init__(self) -> None:
        for attribute, value in vars(self).items():
            if attribute in WORDS and value not in WORDS[attribute]:
                raise UserError(f"unknown {attribute} {value!r}: use one of {', '.join(WORDS[attribute])}")

    @property
    def words(self) -> str:
        """The part of a prompt that names this object."""
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class Scene(Thing):
    """The content of a clip. `prompt` and `from_prompt` are inverse to each other."""

    background: str
    second: Thing | None = None
    """Another object, of another colour. The first object passes in front of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second is not None and self.second.colour == self.colour:
            raise UserError(f"both objects are {self.colour}: give them different colours")
        if self.second is not None and self.size == self.second.size == "large":
            raise UserError("two large objects have no room to pass each other: make one of them small")

    @property
    def things(self) -> tuple[Thing, ...]:
        """The objects, the one in front first."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def prompt(self) -> str:
        return f"{' and '.join(thing.words for thing in self.things)} on a {self.background} background"

    @classmethod
    def from_prompt(cls, prompt: str) -> "Scene":
        """Return the scene of a prompt. UserError names an unknown part and the allowed words."""
        match = re.fullmatch(r"(?P<things>.+) on a (?P<background>\S+) background", " ".join(prompt.lower().split()))
        thing = re.compile(r"a (?P<size>\S+) (?P<colour>\S+) (?P<shape>\S+) moving (?P<direction>.+)")
        parts = [thing.fullmatch(part) for part in re.split(" and (?=a )", match["things"])] if match else []
        if not 1 <= len(parts) <= 2 or None in parts:
            example = all_scenes()[0].prompt
            raise UserError(f"{prompt!r} is not a Shapes prompt: write it like {example!r}")
        second = Thing(**parts[1].groupdict()) if len(parts) == 2 else None
        return cls(**parts[0].groupdict(), background=match["background"], second=second)


def all_scenes(world: World = World.plain) -> list[Scene]:
    """Return all scenes of a world in a fixed order: 576 plain ones; 1,152 rich ones with one object, then pairs."""
    return [*training_scenes(world), *held_out_scenes(world)] if world is World.rich else _single_scenes(DIAGONALS)


def is_shapes_prompt(prompt: str, world: World = World.plain) -> bool:
    """Return whether a prompt describes a scene of a world."""
    try:
        scene = Scene.from_prompt(prompt)
    except UserError:
        return False
    return world is World.rich or (scene.second is None and scene.direction in DIAGONALS)


def shapes_words(world: World = World.plain) -> set[str]:
    """Return the words of all prompts of a world."""
    return {word for scene in all_scenes(world) for word in scene.prompt.split()}


def held_out_scenes(world: World = World.plain) -> list[Scene]:
    """Return the scenes that are never trained on: 96 plain ones; 192 rich ones with one object, then 384 pairs.

    Every attribute value occurs equally often in those with one object. Those with two consist of such objects.
    """
    if world is World.plain:
        return [scene for scene in all_scenes() if _is_held_out(scene)]
    singles = [scene for scene in _single_scenes(DIRECTIONS) if _is_held_out(scene)]
    return [*singles, *_pairs(singles)]


def training_scenes(world: World = World.plain) -> list[Scene]:
    """Return the scenes to train on: 480 plain ones; 960 rich ones with one object, PARTNERS times, and 1,920 pairs."""
    if world is World.plain:
        return [scene for scene in all_scenes() if not _is_held_out(scene)]
    singles = [scene for scene in _single_scenes(DIRECTIONS) if not _is_held_out(scene)]
    return [*singles * PARTNERS, *_pairs(singles)]


def _single_scenes(directions: Iterable[str]) -> list[Scene]:
    return [Scene(*values) for values in itertools.product(SHAPES, COLOURS, SIZES, directions, BACKGROUNDS)]


def _pairs(singles: Sequence[Scene]) -> list[Scene]:
    """Give every scene PARTNERS second objects: those that pass it, in a fixed order."""
    drawn, pairs = random.Random(0), []
    for _, scene in itertools.product(range(PARTNERS), singles):
        fitting = [other for other in singles if _pass_each_other(scene, other)]
        other = drawn.choice(fitting)
        second = Thing(other.shape, other.colour, other.size, other.direction)
        pairs.append(replace(scene, second=second))
    return pairs


def _pass_each_other(scene: Scene, other: Scene) -> bool:
    differ = scene.colour != other.colour and scene.direction != other.direction
    return differ and scene.background == other.background and "small" in (scene.size, other.size)


def _is_held_out(scene: Scene) -> bool:
    """One colour for each combination of the others; 2 shape + 3 size covers Z/6 once, so colours are balanced."""
    index = {name: list(allowed).index(vars(scene)[name]) for name, allowed in WORDS.items()}
    total = 2 * index["shape"] + 3 * index["size"] + index["colour"] + index["direction"] + index["background"]
    return total % len(COLOURS) == 0
