"""The shared loop, and self-forcing seen from inside: who learns from what."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trainer.build import build_trainer
from trainer.objectives.dmd import critic_loss
from trainer.self_forcing import SelfForcingTrainer
from trainer.trainer import RunContext, Trainer
from utils.distributed import Ranks
from utils.tracking import Tracker

pytest_plugins = ["tests.shapes_parts"]


@pytest.fixture
def build(release, tmp_path):
    """Builds the trainer of the release's configuration with overrides."""

    def build(*overrides: str, rank: int = 0) -> Trainer:
        tracker = Tracker(tmp_path, config={}, is_main=False)
        return build_trainer(
            release.config(*overrides), RunContext(tmp_path, torch.device("cpu"), Ranks(rank, 2), tracker)
        )

    return build


def copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.fixture
def self_forcing(build) -> Iterator[SelfForcingTrainer]:
    return build("dmd.replay_rollouts=1", "trainer.steps=30")


def test_streams_differ_by_purpose_and_rank_and_repeat(build):
    def draw(trainer: Trainer, purpose: str) -> list[float]:
        return torch.rand(4, generator=trainer.stream(purpose)).tolist()

    first, other = build(), build(rank=1)
    assert draw(first, "data") == draw(build(), "data")
    assert len({tuple(draw(trainer, purpose)) for trainer in (first, other) for purpose in ("data", "noise")}) == 4


def test_a_step_moves_generator_and_critic_and_never_the_teacher(self_forcing):
    modules = (self_forcing.denoiser, self_forcing.fake_score, self_forcing.real_score)
    before = [copy(module) for module in modules]
    for _ in range(2):
        self_forcing.train_step()
    assert [changed(module, old) for module, old in zip(modules, before, strict=True)] == [True, True, False]
    assert all(not parameter.requires_grad for parameter in self_forcing.real_score.parameters())


def test_a_generator_update_leaves_the_critic_and_a_critic_update_the_generator(self_forcing):
    generator, critic = self_forcing.denoiser, self_forcing.fake_score
    before = copy(critic)
    self_forcing.update_generator()
    assert not changed(critic, before)
    assert all(parameter.grad is None for parameter in critic.parameters())
    before = copy(generator)
    self_forcing.update_critic(fresh=True)
    assert not changed(generator, before)
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_the_critics_loss_falls_on_videos_that_stay(self_forcing):
    self_forcing.update_generator()
    losses = [self_forcing.update_critic(fresh=True) for _ in range(60)]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_the_replay_holds_the_latest_rollouts_without_their_graph(build):
    trainer = build("dmd.replay_rollouts=2")
    for _ in range(3):
        trainer.update_generator()
    assert len(trainer.replay) == 2
    assert not torch.equal(trainer.replay[0][0], trainer.replay[1][0])
    assert all(video.shape == (2, 6, 16, 12, 12) and not video.requires_grad for video, _ in trainer.replay)


def test_a_fresh_critic_update_takes_the_newest_rollout(build, monkeypatch):
    trainer, seen = build("dmd.replay_rollouts=3"), []

    def record(video, *args, **kwargs):
        seen.append(video)
        return critic_loss(video, *args, **kwargs)

    monkeypatch.setattr("trainer.self_forcing.critic_loss", record)
    for _ in range(3):
        trainer.update_generator()
        trainer.update_critic(fresh=True)
        assert seen[-1] is trainer.replay[-1][0]


def test_in_its_head_start_only_the_critic_learns(build):
    trainer = build("dmd.critic_head_start=1", "dmd.replay_rollouts=2")
    generator, critic = copy(trainer.denoiser), copy(trainer.fake_score)
    metrics = trainer.train_step()
    assert metrics.keys() == {"critic_loss"}
    assert changed(trainer.fake_score, critic) and not changed(trainer.denoiser, generator)
    trainer.step += 1
    assert {"generator_loss", "critic_loss"} <= trainer.train_step().keys()
    assert changed(trainer.denoiser, generator)


def test_without_replay_every_critic_update_rolls_out_anew(build, monkeypatch):
    trainer, rollouts = build("dmd.critic_updates=3"), []
    generate = trainer.generate

    def count(batch, *, grad_start_frame):
        rollouts.append(grad_start_frame)
        return generate(batch, grad_start_frame=grad_start_frame)

    monkeypatch.setattr(trainer, "generate", count)
    trainer.train_step()
    assert rollouts == [0, None, None, None]


def test_gradient_reaches_frames_from_the_first_one_asked_for(build):
    trainer = build()
    batch = trainer.next_batch()
    for start, expected in ((0, [True, True]), (3, [False, True])):
        video = trainer.generate(batch, grad_start_frame=start)
        reached = []
        for chunk in (video[:, :3], video[:, 3:]):
            gradients = torch.autograd.grad(
                chunk.sum(), list(trainer.denoiser.parameters()), retain_graph=True, allow_unused=True
            ) if chunk.requires_grad else []  # fmt: skip
            reached.append(any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients))
        assert reached == expected
    assert not trainer.generate(batch, grad_start_frame=None).requires_grad


def test_samples_are_made_with_the_average_and_are_the_same_at_every_call(build):
    trainer = build("trainer.ema_decay=0.999", "optimizer.lr=0.1")
    prompts = trainer.sample_prompts

    def sample() -> Tensor:
        with trainer.ema.applied(), torch.no_grad():
            return trainer.sample_frames(prompts)

    before = sample()
    assert torch.equal(sample(), before)
    trainer.update_generator()
    assert torch.equal(sample(), before)
    with torch.no_grad():
        assert not torch.equal(trainer.sample_frames(prompts), before)


def test_guidance_dropout_replaces_prompts_by_the_negative_one(build):
    diffusion = ("objective=diffusion", "sampling.negative_prompt=bad")
    prompts = ["a cat"] * 400
    dropped = build(*diffusion, "diffusion.guidance_dropout=0.25")._drop(prompts)
    assert set(dropped) == {"a cat", "bad"} and 60 < dropped.count("bad") < 140
    assert build(*diffusion, "diffusion.guidance_dropout=0")._drop(prompts) == prompts
