"""Every objective of configs/shapes works: 30 steps bring the videos of a bad student nearer to their prompts."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import make_ode_pairs
from tests.small_world import CACHED, SHAPES_CONFIGS, World

pytest_plugins = ["tests.shapes_parts", "tests.small_world"]

COMMON = (
    "trainer.steps=30",
    "student.weights={folder}/student",
    "generator.weights={folder}/student",
    "real_score.weights={folder}/teacher",
    *CACHED,
)
DISTILLED = (
    "optimizer.lr=2e-3",
    "critic_optimizer.lr=2e-3",
    "dmd.critic_updates=1",
    "dmd.critic_head_start=0",
    "dmd.replay_rollouts=2",
    "dmd.real_guidance_scale=1.0",
)
GAN_ALONE = (  # the discriminator must know something before the generator follows it
    "gan.heads.depths=[1.0]",
    "optimizer.lr=1e-3",
    "critic_optimizer.lr=4e-3",
    "dmd.critic_updates=3",
    "dmd.critic_head_start=5",
)
RUNS = {
    "self_forcing_dmd": DISTILLED,
    "self_forcing_sid": DISTILLED,
    "self_forcing_gan": (*DISTILLED, *GAN_ALONE),
    "self_forcing_dmd_gan": (*DISTILLED, "gan.heads.depths=[1.0]"),
    "self_forcing_long": (*DISTILLED, "long.max_frames=12"),
    "self_forcing_continued": (*DISTILLED, "long.windows=3"),
    "self_forcing_image": (*DISTILLED, "video.num_frames=7"),
    "self_forcing_framewise": DISTILLED,
    "self_forcing_regression": (*DISTILLED, "ode.pairs={pairs}"),
    "causvid": DISTILLED,
    "teacher": ("optimizer.lr=3e-3",),
    "diffusion_forcing": ("optimizer.lr=5e-3",),
    "teacher_forcing": ("optimizer.lr=5e-3",),
    "ode_regression": ("optimizer.lr=5e-3", "ode.pairs={pairs}"),
    "causal_ode": ("optimizer.lr=5e-3", "ode.pairs={causal_pairs}"),
    "causal_consistency": ("optimizer.lr=4e-3", "consistency.guidance_scale=1.0", "consistency.solver_steps=8"),
}


@pytest.fixture(scope="module")
def pairs(world: World, tmp_path_factory) -> dict[str, Path]:
    """Give trajectories of the teacher: of whole clips, and of chunks after clean context."""
    folders = {"pairs": tmp_path_factory.mktemp("pairs"), "causal_pairs": tmp_path_factory.mktemp("causal_pairs")}
    for (_, folder), flags in zip(folders.items(), ([], ["--causal"]), strict=True):
        flags += ["--config_path", str(SHAPES_CONFIGS / "base.yaml"), "--count", "96", "--batch", "96"]
        overrides = world.overrides(*COMMON, f"ode.pairs={folder}")
        assert make_ode_pairs.main([*flags, "--solver_steps", "8", *overrides]) == 0
    return folders


@pytest.fixture(scope="module")
def before(world: World) -> Callable[[bool], float]:
    """Give the colour error of the student that every objective starts with, as `bidirectional` or chunk by chunk."""
    return functools.cache(
        lambda bidirectional: world.colour_error(world.folder / "student", bidirectional=bidirectional)
    )


@pytest.mark.parametrize("name", RUNS)
def test_thirty_steps_bring_the_videos_nearer_to_what_the_prompts_ask_for(world, pairs, before, tmp_path, name):
    overrides = [text.format(folder=world.folder, **pairs) for text in (*COMMON, *RUNS[name])]
    generator = world.train(name, tmp_path, *overrides)
    bidirectional = name == "teacher"
    start = before(bidirectional)
    after = world.colour_error(generator, bidirectional=bidirectional)
    print(f"{name}: {start:.4f} -> {after:.4f}")
    assert after < 0.75 * start


def test_every_configuration_of_the_shapes_world_but_the_chains_stages_is_run_here():
    stages = {"base", "codec", "codec_final", "teacher_short", "teacher_long"}
    assert {path.stem for path in SHAPES_CONFIGS.glob("*.yaml")} == stages | set(RUNS)
