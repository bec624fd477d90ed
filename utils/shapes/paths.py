"""Measures of a path in the Shapes world: its direction, speed and smoothness, from the centre in each frame."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.shapes.physics import ShapesConfig
from utils.shapes.scenes import DIRECTIONS, Thing, World

DIRECTION_TOLERANCE = 30.0  # degrees
RICH_DIRECTION_TOLERANCE = 22.5  # likewise, in the rich world, whose directions are 45 degrees apart
SPEED_TOLERANCE = 0.2  # of the configured speed
STRAIGHT = 0.3  # pixels rms, below which a window has no bounce
PATH_WINDOW = 5  # frames over which a path is compared with a straight line; bounces on one axis are further apart


def measure_path(
    centroid: Tensor, present: Tensor, thing: Thing, config: ShapesConfig, *, hidden: Tensor | None = None
) -> dict:
    """Return the path fields of a Measurement from centroids [F 2]. Only frames with an object count.

    In frames [F] that are `hidden`, another object may cover this one. Nothing is measured across them.
    """
    frames = present.nonzero()[:, 0]
    if len(frames) < PATH_WINDOW:
        deviation = torch.full_like(centroid[:, 0], math.nan)
        path = {"direction": False, "direction_error_degrees": 180.0, "straightness": math.nan, "smooth": False}
        return {"deviation": deviation, "speed": 0.0, **path}
    first, last = frames[0].item(), frames[-1].item() + 1
    track = _fill_gaps(centroid[first:last], present[first:last])
    seen = torch.ones(len(track), dtype=torch.bool) if hidden is None else ~hidden[first:last]
    whole = seen.unfold(0, PATH_WINDOW, 1).all(1)
    deviation = _deviation(track, config.speed, whole)
    deviation = F.pad(deviation, (first, len(present) - last)).masked_fill(~present, math.nan)
    straightness = deviation.square().nanmean().sqrt().item()
    tolerance = RICH_DIRECTION_TOLERANCE if config.world is World.rich else DIRECTION_TOLERANCE
    before = len(track) if seen.all() else max(PATH_WINDOW, seen.float().argmin().item())
    error = _direction_error(track[:before], thing, config.speed)
    drift = ((track[4:] - track[:-4]).abs() / 4).masked_fill(~_usable(track, whole), math.nan)
    drift = drift.nanmedian(0).values  # per axis; the few bounces do not move a median
    return {
        "deviation": deviation,
        "direction": error <= tolerance,
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


def _bends(track: Tensor) -> Tensor:
    """Return how far a track [F 2] is from a straight line over PATH_WINDOW frames: pixels rms, [F - 4, 2]."""
    time = torch.arange(PATH_WINDOW, dtype=track.dtype)
    basis = torch.linalg.qr(torch.stack([torch.ones_like(time), time], 1)).Q
    windows = track.unfold(0, PATH_WINDOW, 1)  # [windows 2 PATH_WINDOW]
    return (windows - windows @ basis @ basis.T).square().mean(-1).sqrt()


def _usable(track: Tensor, whole: Tensor) -> Tensor:
    """Return the windows [F - 4, 2] whose speed counts. If not all are whole, bounces are left out too: few remain."""
    if whole.all() or not whole.any():
        return torch.ones(len(whole), 2, dtype=torch.bool)
    straight = whole[:, None] & (_bends(track) < STRAIGHT)
    return torch.where(straight.any(0), straight, whole[:, None])


def _deviation(track: Tensor, speed: float, whole: Tensor) -> Tensor:
    """Return the distance in pixels, [F], of a track [F 2] from straight motion between bounces.

    Each axis of each frame uses the best straight line of all `whole` windows that contain it; NaN if there is none.
    So a bounce, with straight motion on both sides, does not count. Neither would a jump, so steps beyond twice the
    speed add their excess.
    """
    bends = _bends(track).masked_fill(~whole[:, None], math.inf)
    padded = F.pad(bends.T, (PATH_WINDOW - 1, PATH_WINDOW - 1), value=math.inf)
    bent = -F.max_pool1d(-padded, PATH_WINDOW, stride=1).norm(dim=0)
    steps = (track[1:] - track[:-1]).norm(dim=1)
    bent = bent.abs().masked_fill(bent.isinf(), math.nan)
    return torch.maximum(bent, F.pad((steps - 2 * speed).clamp_min(0), (1, 0)))


def _direction_error(track: Tensor, thing: Thing, speed: float) -> float:
    """Return the degrees between the prompted direction and a line through the track [F 2] before its first bounce."""
    ahead = (track[3:] - track[:-3]) * (track[4] - track[0]).sign()
    turned = (ahead < -speed).any(1).nonzero()[:, 0]  # the bounce lies within the next frame
    track = track[: max(turned[0].item() + 1, 5)] if len(turned) else track
    time = torch.arange(len(track), dtype=track.dtype)
    time = time - time.mean()
    velocity = time @ track / time.square().sum()
    if velocity.norm() < speed / 4:
        return 180.0
    wanted = torch.tensor(DIRECTIONS[thing.direction], dtype=track.dtype)
    return math.degrees(math.acos(F.cosine_similarity(velocity, wanted, dim=0).clamp(-1, 1).item()))
