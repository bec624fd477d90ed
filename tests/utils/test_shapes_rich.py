"""The rich Shapes world has the stated properties. Its detector accepts real clips and rejects broken ones."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.utils.test_shapes import codec_like, seeded
from utils.errors import UserError
from utils.shapes import (
    FRAME_ATTRIBUTES,
    Measurement,
    Scene,
    ShapesConfig,
    Thing,
    World,
    all_scenes,
    held_out_scenes,
    measure,
    positions,
    render_clips,
    summarise,
    training_scenes,
)
from utils.shapes.patterns import Pattern
from utils.shapes.rendering import render_patterned
from utils.shapes.scenes import DIRECTIONS

FRAMES = 33
CONFIG = ShapesConfig(world=World.rich)
PAIR = Scene("circle", "red", "small", "up and right", "gray", Thing("square", "blue", "large", "left"))
SINGLE = Scene("circle", "red", "large", "right", "navy")
PROMPT = "a small red circle moving up and right and a large blue square moving left on a gray background"
STRIPES = Pattern("stripes", 0.4, 8.0, (0.0, 0.0))
CHECKS = Pattern("checks", 1.0, 8.0, (1.0, 2.0))
GROUND = Pattern("dots", 0.2, 14.0, (0.0, 1.0))
COLUMNS = (*FRAME_ATTRIBUTES, "texture")


def clip_of(
    scene: Scene, *, patterns: tuple[Pattern, ...] = (STRIPES, CHECKS), ground: Pattern = GROUND, speed: float = 1.5
) -> Tensor:
    """Return a clip in which the objects never touch."""
    starts = torch.tensor([[10.0, 40.0], [36.0, 12.0]])[: len(scene.things)]
    paths = positions(scene.things, starts, FRAMES, replace(CONFIG, speed=speed))
    return render_patterned(scene, paths, patterns[: len(paths)], ground, CONFIG)


def wrong(measurement: Measurement) -> set[str]:
    """Return the columns that are right in less than 90 % of the checked frames."""
    return {name for name, values in measurement.columns.items() if values.float().mean() < 0.9}


def test_prompts_of_the_rich_world_round_trip_and_old_ones_mean_what_they_meant():
    assert PAIR.prompt == PROMPT and Scene.from_prompt(f"  {PROMPT.upper()}\n") == PAIR
    scenes = all_scenes(World.rich)
    assert [Scene.from_prompt(scene.prompt) for scene in scenes[::7]] == scenes[::7]
    assert set(all_scenes()) <= set(scenes)
    assert set(held_out_scenes()) <= set(held_out_scenes(World.rich))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (PROMPT.replace("blue", "red"), "both objects are red"),
        (PROMPT.replace("small", "large"), "two large objects have no room"),
        (PROMPT.replace("blue", "pink"), "colour 'pink'.*red, green"),
        (PROMPT.replace("left", "sideways"), "direction 'sideways'.*up and right.*left"),
        (PROMPT.replace(" on a", " and a small cyan circle moving up on a"), "not a Shapes prompt"),
        (PROMPT.replace("large blue", "blue"), "not a Shapes prompt"),
    ],
)
def test_scenes_that_cannot_be_are_refused(prompt, said):
    with pytest.raises(UserError, match=said):
        Scene.from_prompt(prompt)


def test_no_held_out_scene_or_object_on_its_background_is_trained_on():
    train, held_out = training_scenes(World.rich), held_out_scenes(World.rich)
    assert not set(train) & set(held_out)

    def parts(scenes: list[Scene]) -> set[tuple[str, ...]]:
        return {(t.shape, t.colour, t.size, t.direction, s.background) for s in scenes for t in s.things}

    assert not parts(train) & parts(held_out)
    singles = [scene for scene in held_out if scene.second is None]
    assert set(Counter(scene.direction for scene in singles)) == set(DIRECTIONS)
    assert len(set(Counter(scene.direction for scene in singles).values())) == 1


def test_the_plain_world_refuses_two_objects():
    with pytest.raises(ValueError, match=r"world=World\.rich"):
        render_clips([PAIR], 5, seeded())
    with pytest.raises(ValueError, match=r"world=World\.rich"):
        measure(clip_of(PAIR), PAIR)


def test_only_the_generator_decides_about_starts_and_patterns():
    first, again, other = (render_clips([PAIR], 5, seeded(seed), CONFIG) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.min() >= -1 and first.max() <= 1


@pytest.mark.parametrize("degrade", [torch.clone, codec_like], ids=["clean", "codec-like"])
def test_real_clips_score_99_percent_on_every_attribute(degrade):
    scenes = held_out_scenes(World.rich)[:: 36 if degrade is torch.clone else 48]
    clips = degrade(render_clips(scenes, FRAMES, seeded(), CONFIG))
    table = summarise([measure(clip, scene, CONFIG) for clip, scene in zip(clips, scenes, strict=True)], fps=12)
    for name in (*COLUMNS, "direction", "smooth", "speed", "all_right"):
        assert table[name] >= 0.99, (name, table[name])


@pytest.mark.parametrize("scene", [SINGLE, PAIR], ids=["one object", "two objects"])
def test_whole_clips_are_right(scene):
    measurement = measure(clip_of(scene), scene, CONFIG)
    assert measurement.all_right and measurement.smooth and measurement.speed == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scene", [SINGLE, PAIR], ids=["one object", "two objects"])
@pytest.mark.parametrize("surface", ["object", "background"])
@pytest.mark.parametrize("change", ["another pattern", "shifted", "gone"])
def test_a_pattern_that_changes_half_way_fails_alone(scene, surface, change):
    def changed(pattern: Pattern) -> Pattern:
        if change == "shifted":
            return replace(pattern, phase=(pattern.phase[0] + 3.1, pattern.phase[1]))
        return replace(pattern, angle=pattern.angle + 1.2, kind="flat" if change == "gone" else "stripes")

    after = {"patterns": (STRIPES, changed(CHECKS))[:: 1 if scene.second else -1]} if surface == "object" else {}
    after = after or {"ground": changed(GROUND)}
    before = {"patterns": (STRIPES, CHECKS)[:: 1 if scene.second else -1]}
    clip = torch.cat([clip_of(scene, **before)[:16], clip_of(scene, **(before | after))[16:]])
    measurement = measure(clip, scene, CONFIG)
    assert wrong(measurement) == {"texture"} and not measurement.all_right


def test_a_pattern_that_does_not_move_with_its_object_fails():
    """The object is a window onto a pattern that stands still."""
    paths = positions(SINGLE.things, torch.tensor([[12.0, 24.0]]), FRAMES, CONFIG)
    frames = []
    for t in range(FRAMES):
        still = replace(STRIPES, angle=0.0, phase=(2 * torch.pi * paths[0, t, 0].item() / STRIPES.period, 0.0))
        frames.append(render_patterned(SINGLE, paths[:, t : t + 1], [still], GROUND, CONFIG))
    assert wrong(measure(torch.cat(frames), SINGLE, CONFIG)) == {"texture"}


def test_swapped_objects_fail():
    """Each object has the colour of the other one."""
    swapped = replace(PAIR, colour="blue", second=replace(PAIR.second, colour="red"))
    measurement = measure(clip_of(swapped), PAIR, CONFIG)
    assert {"shape", "size"} <= wrong(measurement) and not measurement.all_right and not measurement.direction


@pytest.mark.parametrize("attribute", ["shape", "size", "colour", "background"])
def test_one_wrong_attribute_of_the_second_object_fails(attribute):
    values = {"shape": "triangle", "size": "small", "colour": "cyan", "background": "navy"}
    if attribute == "background":
        other = replace(PAIR, background="navy")
    else:
        other = replace(PAIR, second=replace(PAIR.second, **{attribute: values[attribute]}))
    assert attribute in wrong(measure(clip_of(other), PAIR, CONFIG))


def test_an_object_that_gets_lost_is_not_present():
    both, alone = clip_of(PAIR), clip_of(replace(PAIR, second=None))
    measurement = measure(torch.cat([both[:12], alone[12:]]), PAIR, CONFIG)
    assert {"present", "shape"} <= wrong(measurement)
    assert "present" in wrong(measure(alone, PAIR, CONFIG)) and "present" in wrong(measure(both, SINGLE, CONFIG))


def test_an_object_is_excused_while_the_other_hides_it_but_not_if_it_stays_away():
    scene = Scene("square", "red", "large", "right", "gray", Thing("circle", "blue", "small", "left"))
    paths = positions(scene.things, torch.tensor([[10.0, 24.0], [40.0, 24.0]]), FRAMES, CONFIG)
    clip = render_patterned(scene, paths, (STRIPES, CHECKS), GROUND, CONFIG)
    measurement = measure(clip, scene, CONFIG)
    assert measurement.all_right and not measurement.judged.all()
    behind = measurement.judged.nonzero()[:, 0].diff().argmax().item() + 1
    paths[1, behind:] = -100
    lost = measure(render_patterned(scene, paths, (STRIPES, CHECKS), GROUND, CONFIG), scene, CONFIG)
    assert "present" in wrong(lost)


@pytest.mark.parametrize("direction", ["up", "right", "down and left"])
def test_a_wrong_direction_of_one_object_fails(direction):
    assert not measure(clip_of(replace(PAIR, direction=direction)), PAIR, CONFIG).direction


def test_half_the_speed_is_measured_as_half():
    assert measure(clip_of(PAIR, speed=0.75), PAIR, CONFIG).speed == pytest.approx(0.5, abs=0.05)


def test_the_exact_path_goes_on_from_any_frame():
    whole = positions(PAIR.things, torch.tensor([[10.0, 40.0], [36.0, 12.0]]), 12, CONFIG)
    torch.testing.assert_close(positions(PAIR.things, whole[:, 4], 8, CONFIG), whole[:, 4:])
