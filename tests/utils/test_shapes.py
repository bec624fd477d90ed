"""The Shapes world has the stated properties. Its detector accepts real clips and rejects broken ones."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.shapes import (
    ATTRIBUTES,
    FRAME_ATTRIBUTES,
    FREE_FRAMES,
    Measurement,
    Scene,
    ShapesConfig,
    all_scenes,
    bounds,
    held_out_scenes,
    measure,
    render_at,
    render_clips,
    summarise,
    training_scenes,
    trajectories,
)

FRAMES = 33
SCENE = Scene("triangle", "red", "large", "up and right", "navy")
OTHER = {"shape": "square", "colour": "blue", "size": "small", "background": "gray"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip_of(scene: Scene, frames: int = FRAMES) -> Tensor:
    return render_clips([scene], frames, seeded())[0]


def fractions(measurement: Measurement) -> dict[str, float]:
    return {name: getattr(measurement, name).float().mean().item() for name in FRAME_ATTRIBUTES}


def codec_like(clips: Tensor) -> Tensor:
    """Return clips with a 3x3 blur and Gaussian noise of 0.05."""
    blurred = F.avg_pool2d(F.pad(clips.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(clips)
    return (blurred + 0.05 * torch.randn(clips.shape, generator=seeded(1))).clamp(-1, 1)


def test_scenes_split_into_480_for_training_and_96_held_out():
    train, held_out = training_scenes(), held_out_scenes()
    assert (len(train), len(held_out)) == (480, 96)
    assert set(train) | set(held_out) == set(all_scenes()) and not set(train) & set(held_out)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_held_out_scenes_are_balanced_over_every_attribute(attribute):
    counts = Counter(getattr(scene, attribute) for scene in held_out_scenes())
    assert set(counts) == set(ATTRIBUTES[attribute]) and len(set(counts.values())) == 1
    assert {getattr(scene, attribute) for scene in training_scenes()} == set(counts)


def test_prompts_round_trip():
    assert SCENE.prompt == "a large red triangle moving up and right on a navy background"
    assert [Scene.from_prompt(scene.prompt) for scene in all_scenes()] == all_scenes()
    assert Scene.from_prompt("  A large RED triangle  moving up and right on a navy background\n") == SCENE


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a large pink circle moving up and left on a navy background", "colour 'pink'.*red, green"),
        ("a large red circle moving sideways on a navy background", "direction 'sideways'.*up and right"),
        ("a cat", "'a cat' is not a Shapes prompt"),
    ],
)
def test_unknown_prompts_name_what_is_unknown_and_what_is_allowed(prompt, said):
    with pytest.raises(UserError, match=said):
        Scene.from_prompt(prompt)


def test_default_prompts_are_held_out_and_varied():
    prompts = Path(__file__).parents[2] / "prompts" / "shapes.txt"
    scenes = [Scene.from_prompt(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    assert len(set(scenes)) == 8 and set(scenes) <= set(held_out_scenes())
    for attribute, values in ATTRIBUTES.items():
        assert {getattr(scene, attribute) for scene in scenes} == set(values)


def test_clips_depend_on_the_generator_alone():
    scenes = held_out_scenes()[:3]
    first, again, other = (render_clips(scenes, 5, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_clips_are_float32_within_range():
    clips = render_clips(all_scenes()[::7], 9, seeded())
    assert clips.dtype == torch.float32 and clips.shape == (83, 9, 3, 48, 48)
    assert clips.min() >= -1 and clips.max() <= 1 and not clips.isnan().any()


def test_bounces_are_elastic_and_come_late():
    """Along each axis the speed is constant and turns only at a wall. The first frames move as the prompt says."""
    config, scenes = ShapesConfig(), all_scenes()
    centres = trajectories(scenes, 200, seeded(), config)
    low, high = bounds(scenes, config, centres.device)
    assert (centres >= low[:, None] - 1e-4).all() and (centres <= high[:, None] + 1e-4).all()
    step = centres.diff(dim=1)
    travel = torch.full_like(step, config.speed / 2**0.5)
    nearest_wall = torch.minimum(centres - low[:, None], high[:, None] - centres)[:, :-1]
    away_from_walls = nearest_wall > travel
    torch.testing.assert_close(step.abs()[away_from_walls], travel[away_from_walls], atol=1e-4, rtol=0)
    assert (step.abs() <= travel + 1e-4).all()
    wanted = torch.tensor([ATTRIBUTES["direction"][scene.direction] for scene in scenes])[:, None]
    torch.testing.assert_close(step[:, :FREE_FRAMES], (wanted * travel)[:, :FREE_FRAMES], atol=1e-4, rtol=0)


def test_objects_stay_entirely_inside_the_frame():
    """The drawn area is the same in every frame, so no object is ever cut off."""
    for scene in [SCENE, replace(SCENE, shape="circle"), replace(SCENE, shape="square", size="small")]:
        background = render_at([scene], torch.full((1, 1, 2), -100.0))[0]
        ink = (clip_of(scene, 150) - background).abs().sum((1, 2, 3))
        torch.testing.assert_close(ink, ink[:1].expand_as(ink), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("scenes", "degrade"),
    [(training_scenes()[::15], torch.clone), (held_out_scenes()[::2], codec_like)],
    ids=["clean", "codec-like"],
)
def test_real_clips_score_99_percent_on_every_attribute(scenes, degrade):
    clips = degrade(render_clips(scenes, FRAMES, seeded()))
    table = summarise([measure(clip, scene) for clip, scene in zip(clips, scenes, strict=True)], fps=8)
    for name in (*FRAME_ATTRIBUTES, "direction", "smooth", "speed", "all_right"):
        assert table[name] >= 0.99, (name, table[name])


def test_the_detector_follows_the_resolution():
    config = ShapesConfig(resolution=64, speed=2.0)
    clip = render_clips([SCENE], FRAMES, seeded(), config)[0]
    measurement = measure(clip, SCENE, config)
    assert measurement.all_right and measurement.smooth and abs(measurement.speed - 1) < 0.05


@pytest.mark.parametrize("attribute", OTHER)
def test_a_wrong_attribute_fails_alone(attribute):
    measurement = measure(clip_of(replace(SCENE, **{attribute: OTHER[attribute]})), SCENE)
    expected = {name: 0.0 if name == attribute else 1.0 for name in FRAME_ATTRIBUTES}
    assert fractions(measurement) == expected and not measurement.all_right


@pytest.mark.parametrize("scene", held_out_scenes()[::5], ids=lambda scene: scene.prompt)
def test_every_wrong_value_of_an_attribute_fails(scene):
    clip = clip_of(scene, frames=6)
    for attribute in ("shape", "colour", "size", "background"):
        for value in set(ATTRIBUTES[attribute]) - {getattr(scene, attribute)}:
            assert not getattr(measure(clip, replace(scene, **{attribute: value})), attribute).any()


def test_a_missing_object_fails_everything_but_the_background():
    empty = render_at([SCENE], torch.full((1, FRAMES, 2), -100.0))[0]
    measurement = measure(codec_like(empty[None])[0], SCENE)
    assert fractions(measurement) == {"present": 0, "colour": 0, "shape": 0, "size": 0, "background": 1}
    assert not measurement.direction and not measurement.smooth and measurement.speed == 0
    json.dumps(summarise([measurement], fps=8), allow_nan=False)


def test_an_object_in_pieces_or_in_company_is_not_present():
    whole = render_at([SCENE], torch.full((1, 4, 2), 24.0))[0]
    gap = whole[..., :1].expand(-1, -1, -1, 8)
    torn = torch.cat([whole[..., 4:24], gap, whole[..., 24:44]], -1)
    assert measure(whole, SCENE).present.all() and not measure(torn, SCENE).present.any()
    small = replace(SCENE, size="small", shape="circle")
    one, two = (render_at([small], torch.full((1, 4, 2), at))[0] for at in (12.0, 36.0))
    both = torch.cat([one[..., :24, :], two[..., 24:, :]], -2)
    assert measure(one, small).present.all() and not measure(both, small).present.any()


def test_an_object_of_a_colour_off_the_palette_fails_in_colour():
    clip = clip_of(replace(SCENE, background="black"))
    washed_out = torch.where(clip > -0.9, 0.3, clip)
    assert measure(washed_out, SCENE).present.all() and not measure(washed_out, SCENE).colour.any()


def test_an_object_vanishing_half_way_is_present_half_of_the_time():
    clip = clip_of(SCENE, 32)
    clip[16:] = render_at([SCENE], torch.full((1, 16, 2), -100.0))[0]
    measurement = measure(clip, SCENE)
    assert fractions(measurement)["present"] == 0.5 and measurement.direction and not measurement.all_right
    seconds = summarise([measurement], fps=8)["seconds"]
    assert [row["present"] for row in seconds] == [1, 1, 0, 0] and [row["frames"] for row in seconds] == [8] * 4


def test_a_frozen_object_has_no_direction():
    measurement = measure(clip_of(SCENE)[:1].expand(FRAMES, -1, -1, -1), SCENE)
    assert not measurement.direction and measurement.direction_error_degrees == 180 and measurement.speed < 0.01
    assert fractions(measurement)["present"] == 1 and not measurement.all_right


@pytest.mark.parametrize(
    ("direction", "degrees"), [("down and left", 180), ("up and left", 90), ("down and right", 90)]
)
def test_a_wrong_direction_fails(direction, degrees):
    measurement = measure(clip_of(replace(SCENE, direction=direction)), SCENE)
    assert not measurement.direction and measurement.direction_error_degrees == pytest.approx(degrees, abs=2)


def test_jumps_and_jitter_are_not_smooth():
    centres = trajectories([SCENE], FRAMES, seeded())
    away = torch.where(torch.arange(FRAMES)[:, None] < 8, 0.0, 6.0)
    jitter = torch.randn(centres.shape, generator=seeded(2))
    straight, jumping, jittering = (
        measure(render_at([SCENE], moved)[0], SCENE) for moved in (centres, centres + away, centres + jitter)
    )
    assert straight.smooth and straight.straightness < 0.25
    assert jumping.deviation.nan_to_num().argmax() == 8 and not jumping.smooth
    assert jittering.straightness > 0.5 and not jittering.smooth


def test_half_the_speed_is_measured_as_half():
    slow = render_clips([SCENE], FRAMES, seeded(), ShapesConfig(speed=0.75))[0]
    assert measure(slow, SCENE).speed == pytest.approx(0.5, abs=0.03)


def test_a_clip_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\): expected \[F 3 48 48\]"):
        measure(torch.zeros(4, 3, 32, 32), SCENE)


@pytest.mark.parametrize("values", [{"resolution": 8}, {"speed": 0.0}, {"speed": 40.0}])
def test_impossible_worlds_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}={next(iter(values.values()))}"):
        ShapesConfig(**values)
