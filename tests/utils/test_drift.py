"""The change is 1 for a video that does not drift, and each measure detects the property in its name."""

import pytest
import torch

from utils.drift import MEASURES, measure_drift, summarise_drift


def moving(frames: int = 48) -> torch.Tensor:
    """Return a pattern that moves at constant speed, uint8 [F H W 3]."""
    picture = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    return (255 * torch.stack([picture.roll(shift, dims=1) for shift in range(frames)])).byte()


def changed(change) -> torch.Tensor:
    clip = moving().float()
    clip[24:] = change(clip[24:])
    return clip.clamp(0, 255).byte()


def test_a_steady_video_does_not_drift():
    drift = measure_drift(moving(), fps=12)
    assert all(drift.change[name] == pytest.approx(1, abs=0.05) for name in MEASURES if name != "flicker")
    assert drift.first["flicker"] < 0.01 and drift.last["flicker"] < 0.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", lambda clip: clip * 0.5),
        ("colourfulness", lambda clip: clip.mean(-1, keepdim=True).expand_as(clip)),
        ("motion", lambda clip: clip[:1].expand_as(clip)),
        ("sharpness", lambda clip: (clip + clip.roll(1, 1) + clip.roll(1, 2) + clip.roll(2, 1)) / 4),
    ],
)
def test_each_measure_falls_with_what_it_is_named_after(name, change):
    assert measure_drift(changed(change), fps=12).change[name] < 0.7


def test_flicker_is_found():
    clip = moving().float() * 0.5
    clip[24::2] += 60
    drift = measure_drift(clip.byte(), fps=12)
    assert drift.last["flicker"] > 50 * (drift.first["flicker"] + 0.01)


def test_short_videos_are_compared_by_halves():
    assert set(summarise_drift([measure_drift(moving(9), fps=12)])) == set(MEASURES)
