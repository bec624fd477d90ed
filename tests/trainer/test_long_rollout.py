"""Rollouts that are longer than the scored window, that continue from step to step, or that start from an image."""

import copy
import math

import pytest
import torch

from model.flow_matching import FlowMatching
from trainer.build import build_trainer
from trainer.objectives.dmd import sample_score_timesteps
from trainer.trainer import RunContext, Trainer
from utils.distributed import Ranks
from utils.errors import UserError
from utils.tracking import Tracker

pytest_plugins = ["tests.shapes_parts"]

LONG = ("objective=self_forcing_long", "long.max_frames=12", "dmd.replay_rollouts=1", "dmd.critic_updates=1")
CONTINUED = ("objective=self_forcing_continued", "long.windows=3", *LONG[2:])
IMAGE = ("objective=self_forcing_image", "video.num_frames=7", "rollout.independent_first_frame=true", *LONG[2:])


@pytest.fixture
def build(release, tmp_path):
    def build(*overrides: str) -> Trainer:
        tracker = Tracker(tmp_path, config={}, is_main=False)
        return build_trainer(release.config(*overrides), RunContext(tmp_path, torch.device("cpu"), Ranks(), tracker))

    return build


def test_rollouts_have_every_allowed_length_and_the_scores_see_the_last_window(build, monkeypatch):
    trainer, rolled = build(*LONG), []
    generation, roll = trainer.generation, trainer.generation.roll

    def noted(*args, **options):
        latents, facts = roll(*args, **options)
        rolled.append((args[2], options["grad_start_frame"], latents))
        return latents, facts

    monkeypatch.setattr(generation, "roll", noted)
    for _ in range(8):
        micro_batch = trainer.micro_batches()[0]
        video, facts = generation.video(micro_batch, trainer.batch(micro_batch), with_grad=True)
        frames, grad_start, whole = rolled[-1]
        assert video.shape[1] == 6 and grad_start == frames - 6
        assert torch.equal(video[:, 1:], whole[:, frames - 5 :])
        assert facts.uncounted_by_critic == 0
        if frames == 6:
            assert facts.uncounted == 0 and torch.equal(video, whole)
        else:  # the whole chunk whose first latent was encoded anew
            assert facts.uncounted == 3 and not torch.equal(video[:, 0], whole[:, frames - 6])
        trainer.step += 1
    assert {frames for frames, _, _ in rolled} == {6, 9, 12}


def test_with_an_independent_first_frame_only_that_frame_is_left_out(build):
    trainer = build(*LONG, "rollout.independent_first_frame=true", "video.num_frames=7", "long.max_frames=10")
    left_out = set()
    for _ in range(8):
        micro_batch = trainer.micro_batches()[0]
        left_out.add(trainer.generation.video(micro_batch, trainer.batch(micro_batch), with_grad=False).facts.uncounted)
        trainer.step += 1
    assert left_out == {0, 1}


def test_a_continued_rollout_goes_on_from_its_last_visible_frames_and_changes_its_prompt(build):
    trainer, prompts, steps = build(*CONTINUED), [], []
    progress = trainer.generation.progress
    for _ in range(4):
        window, before = progress.window, progress.past.get(0)
        trainer.train_step()
        rollouts = trainer.replay[-1]
        prompts.append(trainer.data.read(rollouts.prompts.indices).prompts)
        steps.append((window, before, progress.past[0], rollouts))
    assert [window for window, *_ in steps] == [0, 1, 2, 0]
    assert prompts[0] != prompts[2] and prompts[1] in (prompts[0], prompts[2]) and prompts[3] not in prompts[:3]
    for window, before, after, rollouts in steps[:3]:
        video, facts = rollouts.videos[0], rollouts.facts
        assert after.visible.shape[1] == 3  # window 6 less a chunk of 3
        assert torch.equal(after.visible, after.latest[:, -3:]) and after.latest.shape[1] == video.shape[1] == 6
        assert torch.equal(video[:, 1:], after.latest[:, 1:]) and torch.equal(video, after.latest) == (window == 0)
        assert facts.uncounted == facts.uncounted_by_critic == (3 if window else 0)
        if window:  # the first chunk is the last one of the window before
            assert torch.equal(after.latest[:, :3], before.latest[:, -3:])


@pytest.mark.parametrize(
    ("schedule", "expected"), [("false", {(0.0, 1000.0)}), ("true", {(500.0, 1000.0), (0.0, 500.0)})]
)
def test_score_timesteps_lie_between_the_exit_step_and_the_next_one_if_asked(build, monkeypatch, schedule, expected):
    """The bounds of ts_schedule are the unwarped steps, whether the list is warped or not."""
    both = (f"dmd.ts_schedule={schedule}", f"dmd.ts_schedule_max={schedule}", "rollout.denoising_steps=[1000,500]")
    seen = set()

    def noted(*args, lowest, highest):
        seen.add((lowest, highest))
        return sample_score_timesteps(*args, lowest=lowest, highest=highest)

    monkeypatch.setattr("trainer.matching.sample_score_timesteps", noted)
    trainer = build(*both, "dmd.critic_updates=4")
    for _ in range(2):
        trainer.train_step()
    assert seen == expected
    warped = FlowMatching(5.0).warp([1000, 500])
    unwarped = build("rollout.warp_denoising_step=false", f"rollout.denoising_steps={warped}").generation
    facts = unwarped.video(micro := trainer.micro_batches()[0], trainer.batch(micro), with_grad=False).facts
    assert facts.exit_level == pytest.approx(1000.0) or facts.exit_level == pytest.approx(500.0, abs=1e-3)


def test_second_prompts_are_those_on_the_same_line(build, tmp_path):
    (tmp_path / "first.txt").write_text("a\nb\nc\n")
    (tmp_path / "second.txt").write_text("A\nB\nC\n")
    paired = (
        *(*CONTINUED, "data.kind=prompts", f"data.path={tmp_path}/first.txt"),
        f"data.switch_path={tmp_path}/second.txt",
    )
    samples = build(*paired).data.read(range(5))
    assert samples.second_prompts == [prompt.upper() for prompt in samples.prompts]
    (tmp_path / "second.txt").write_text("A\n\nC\n")
    with pytest.raises(UserError, match=r"second.txt, line 2: holds no prompt, but .*first.txt, line 2, is 'b'"):
        build(*paired)


def test_every_critic_update_makes_the_next_window_without_replay(build, monkeypatch):
    trainer, windows = build(*CONTINUED, "dmd.replay_rollouts=0", "dmd.critic_updates=2"), []
    update = trainer.update

    def recorded(*arguments, **options):
        windows.append(trainer.generation.progress.window)
        return update(*arguments, **options)

    monkeypatch.setattr(trainer, "update", recorded)
    for _ in range(3):
        trainer.train_step()
    assert windows == [0, 1, 2] * 3


def test_a_skipped_update_ends_its_rollout(build, monkeypatch):
    trainer = build(*CONTINUED)
    trainer.train_step()
    progress = trainer.generation.progress
    assert progress.window == 1
    with monkeypatch.context() as failing:
        failing.setattr(trainer.updater, "step", lambda *, skip=False: math.nan)
        assert trainer.train_step()["skipped"] == 1
    first = progress.prompts[0]
    trainer.train_step()
    assert progress.window == 1 and progress.prompts[0] != first


def test_a_continued_rollout_resumes_to_the_last_bit(build):
    straight = build(*CONTINUED)
    straight.train_step()
    saved = copy.deepcopy({name: each.state_dict() for name, each in straight.stateful().items()})
    straight.train_step()
    resumed = build(*CONTINUED)
    for name, each in resumed.stateful().items():
        each.load_state_dict(saved[name])
    resumed.step = 1
    resumed.train_step()
    expected, actual = straight.denoiser.state_dict(), resumed.denoiser.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert torch.equal(resumed.generation.progress.past[0].latest, straight.generation.progress.past[0].latest)


def test_a_video_goes_on_from_the_given_image_which_the_loss_leaves_out(build):
    trainer = build(*IMAGE)
    micro_batch = trainer.micro_batches()[0]
    batch = trainer.batch(micro_batch)
    first = trainer.codec.encode(trainer.data.read(micro_batch.indices).frames)
    video, facts = trainer.generation.video(micro_batch, batch, with_grad=True)
    assert video.shape[1] == 7 and torch.equal(video[:, :1], first)
    assert facts.uncounted == 1 and facts.uncounted_by_critic == 0
    metrics = trainer.train_step()
    assert metrics["generator_loss"] > 0
    shown = trainer.sample_frames(range(len(trainer.sample_prompts)))
    given = trainer.codec.decode(trainer.sample_images)
    assert torch.allclose(shown[:, :1], given, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*LONG, "long.max_frames=3"), "long.max_frames=3 is less than video.num_frames=6"),
        ((*LONG, "long.max_frames=10"), "num_frames=10 is not a multiple of frames_per_chunk=3"),
        ((*CONTINUED, "long.overlap=6"), "long.overlap=6 must be at least 1 and less than video.num_frames=6"),
        ((*CONTINUED, "long.overlap=2"), "num_frames=4 is not a multiple of frames_per_chunk=3"),
        ((*CONTINUED, "data.switch_path=x"), "data.switch_path=x needs data.kind=prompts, not shapes"),
        ((*IMAGE, "rollout.independent_first_frame=false"), "rollout.independent_first_frame=false: a given frame"),
    ],
)
def test_sizes_that_do_not_fit_are_named(build, overrides, message):
    with pytest.raises(UserError, match=message):
        build(*overrides)
