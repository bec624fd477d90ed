"""Rollouts that are longer than what is scored, go on from step to step, or start from an image."""

import copy

import pytest
import torch

from trainer.build import build_trainer
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
    roll = trainer.roll

    def noted(*args, **options):
        rolled.append((args[2], options["grad_start_frame"], roll(*args, **options)))
        return rolled[-1][2]

    monkeypatch.setattr(trainer, "roll", noted)
    for _ in range(8):
        micro_batch = trainer.micro_batches()[0]
        video = trainer.generate(micro_batch, trainer.batch(micro_batch), grad_start_frame=0)
        frames, grad_start, whole = rolled[-1]
        counted = trainer.counted(micro_batch)
        assert video.shape[1] == 6 and grad_start == frames - 6
        assert torch.equal(video[:, 1:], whole[:, frames - 5 :])
        if frames == 6:
            assert counted is None and torch.equal(video, whole)
        else:
            assert counted.tolist() == [False] + [True] * 5 and not torch.equal(video[:, 0], whole[:, frames - 6])
        trainer.step += 1
    assert {frames for frames, _, _ in rolled} == {6, 9, 12}


def test_a_continued_rollout_goes_on_from_its_last_visible_frames_and_changes_its_prompt(build):
    trainer, prompts, visible = build(*CONTINUED), [], []
    for _ in range(4):
        before = trainer.progress.past.get(0)
        trainer.train_step()
        prompts.append(trainer.data.read(trainer.replay[-1].batch).prompts)
        visible.append((before, trainer.progress.past[0], trainer.replay[-1].videos[0], trainer.window))
    assert [window for *_, window in visible] == [0, 1, 2, 0]
    assert prompts[0] != prompts[2] and prompts[1] in (prompts[0], prompts[2]) and prompts[3] not in prompts[:3]
    for before, after, video, window in visible[:3]:
        assert after.visible.shape[1] == 3  # window 6 less a chunk of 3
        assert torch.equal(after.visible, after.latest[:, -3:])
        assert torch.equal(video[:, 1:], after.latest[:, 1:]) and torch.equal(video, after.latest) == (window == 0)
        assert (trainer.counted(None) is None) == (trainer.window == 0)
        assert window == 0 or not torch.equal(before.latest, after.latest)


def test_a_skipped_update_ends_its_rollout(build):
    trainer = build(*CONTINUED)
    trainer.train_step()
    assert trainer.progress.window == 1
    updates = trainer.updates()
    next(updates)
    updates.close()  # what the loop does after a skipped update
    trainer.step += 1
    trainer.train_step()
    assert trainer.window == 0 and trainer.progress.window == 1


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
    assert torch.equal(resumed.progress.past[0].latest, straight.progress.past[0].latest)


def test_a_video_goes_on_from_the_given_image_which_the_loss_leaves_out(build):
    trainer = build(*IMAGE)
    micro_batch = trainer.micro_batches()[0]
    batch = trainer.batch(micro_batch)
    first = trainer.codec.encode(trainer.data.read(micro_batch.indices).frames)
    video = trainer.generate(micro_batch, batch, grad_start_frame=0)
    assert video.shape[1] == 7 and torch.equal(video[:, :1], first)
    assert trainer.counted(micro_batch).tolist() == [False] + [True] * 6
    metrics = trainer.train_step()
    assert metrics["generator_loss"] > 0
    shown = trainer.sample_frames(trainer.sample_prompts)
    given = trainer.codec.decode(trainer.sample_images)
    assert torch.allclose(shown[:, :1], given, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*LONG, "long.max_frames=3"), "long.max_frames=3 is less than video.num_frames=6"),
        ((*LONG, "long.max_frames=10"), "num_frames=10 is not a multiple of frames_per_chunk=3"),
        ((*CONTINUED, "dmd.replay_rollouts=0"), "a continued rollout needs 1 or more"),
        ((*IMAGE, "rollout.independent_first_frame=false"), "rollout.independent_first_frame=false: a given frame"),
    ],
)
def test_sizes_that_do_not_fit_are_named(build, overrides, message):
    with pytest.raises(UserError, match=message):
        build(*overrides)
