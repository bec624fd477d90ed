"""The result of the detector for a clip, and the table of many clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.shapes.paths import SPEED_TOLERANCE

FRAME_ATTRIBUTES = ("present", "colour", "shape", "size", "background")


@dataclass(frozen=True)
class Measurement:
    """A clip compared with its scene. In a frame without the object, colour, shape and size are wrong too.

    If there are two objects, a value is true only if it is true for both, and a number is the worse one.
    """

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
    texture: Tensor | None = None  # [F] bool: the rich world's patterns are as in the first frames
    judged: Tensor | None = None  # [F] bool: no object hides another; None: every frame. The others are not counted
    paths: tuple[Tensor, ...] = ()  # the centre of each object [F 2], NaN in a frame in which it was not found

    @property
    def columns(self) -> dict[str, Tensor]:
        """The attributes that are measured frame by frame: name -> [judged frames] bool."""
        names = FRAME_ATTRIBUTES if self.texture is None else (*FRAME_ATTRIBUTES, "texture")
        return {name: getattr(self, name)[self.judged_frames] for name in names}

    @property
    def judged_frames(self) -> Tensor:
        """The indices of the frames that count."""
        return torch.arange(len(self.present)) if self.judged is None else self.judged.nonzero()[:, 0]

    @property
    def right_speed(self) -> bool:
        """True if the speed is within SPEED_TOLERANCE of the configured one."""
        return abs(self.speed - 1) <= SPEED_TOLERANCE

    @property
    def all_right(self) -> bool:
        """True if the direction is right, and every other attribute is right in at least 90 % of the judged frames.

        At least a sixth of the frames must be judged: objects that never part are not right.
        """
        fractions = [values.float().mean().item() for values in self.columns.values()]
        return self.direction and min(fractions) >= 0.9 and len(self.judged_frames) >= len(self.present) / 6


def summarise(measurements: Sequence[Measurement], fps: float) -> dict:
    """Return a JSON-ready table of fractions over all clips. "seconds" has the per-frame ones second by second."""
    frames = {name: torch.cat([m.columns[name] for m in measurements]).float() for name in measurements[0].columns}
    deviation = torch.cat([m.deviation[m.judged_frames] for m in measurements])
    second = torch.cat([m.judged_frames // fps for m in measurements])
    clips = {
        "direction": [m.direction for m in measurements],
        "smooth": [m.smooth for m in measurements],
        "speed": [m.right_speed for m in measurements],
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
