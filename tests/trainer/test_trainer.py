"""The common training loop, and Self Forcing: which network learns from which videos."""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.parity import relative_error
from tests.shapes_parts import CODEC
from trainer import parallelize
from trainer.build import build_trainer
from trainer.matching import Term
from trainer.objectives.dmd import critic_loss
from trainer.self_forcing import SelfForcingTrainer
from trainer.trainer import RunContext, Trainer
from utils.distributed import Ranks
from utils.errors import UserError
from utils.tracking import Tracker

pytest_plugins = ["tests.shapes_parts"]


@pytest.fixture
def build(release, tmp_path):
    """Give a function that builds the trainer of the release's configuration with overrides."""

    def build(*overrides: str) -> Trainer:
        tracker = Tracker(tmp_path, config={}, is_main=False)
        return build_trainer(release.config(*overrides), RunContext(tmp_path, torch.device("cpu"), Ranks(), tracker))

    return build


def copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.fixture
def self_forcing(build) -> Iterator[SelfForcingTrainer]:
    return build("dmd.replay_rollouts=1", "trainer.steps=30")


def test_streams_differ_by_purpose_and_repeat(build):
    def draw(trainer: Trainer, purpose: str) -> list[float]:
        return torch.rand(4, generator=trainer.stream(purpose)).tolist()

    assert draw(build(), "data") == draw(build(), "data") != draw(build(), "noise")


def test_a_step_moves_generator_and_critic_and_never_the_teacher(self_forcing):
    modules = (self_forcing.denoiser, self_forcing.fake_score, self_forcing.real_score)
    before = [copy(module) for module in modules]
    for _ in range(2):
        self_forcing.train_step()
    assert [changed(module, old) for module, old in zip(modules, before, strict=True)] == [True, True, False]
    assert all(not parameter.requires_grad for parameter in self_forcing.real_score.parameters())


def test_a_generator_update_leaves_the_critic_and_a_critic_update_the_generator(self_forcing):
    generator, critic = self_forcing.denoiser, self_forcing.fake_score
    for update, moving, resting in (
        (self_forcing.update_generator, generator, critic),
        (lambda: self_forcing.update_critic(0), critic, generator),
    ):
        before, still = copy(moving), copy(resting)
        assert update().is_applied
        assert all(parameter.grad is None for parameter in resting.parameters())
        assert changed(moving, before) and not changed(resting, still)


def test_the_critics_loss_falls_on_videos_that_stay(build):
    trainer = build("dmd.replay_rollouts=1", "dmd.critic_updates=40", "dmd.critic_head_start=1")
    losses = [update.metrics["critic_loss"] for update in trainer.updates()]
    assert len(losses) == 40 and sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_the_replay_holds_the_latest_rollouts_without_their_graph(build):
    trainer = build("dmd.replay_rollouts=2", "trainer.total_batch_size=4", "dmd.critic_updates=1")
    for _ in range(3):
        trainer.train_step()
    assert [rollouts.prompts.indices for rollouts in trainer.replay] == [range(4, 8), range(8, 12)]
    videos = [video for rollouts in trainer.replay for video in rollouts.videos]
    assert len(videos) == 4 and not torch.equal(videos[0], videos[2])
    assert all(video.shape == (2, 6, CODEC.latent_channels, 12, 12) and not video.requires_grad for video in videos)


def test_the_first_critic_update_takes_the_newest_rollouts(build, monkeypatch):
    trainer, seen = build("dmd.replay_rollouts=3", "dmd.critic_updates=2"), []

    def record(video, *args, **kwargs):
        seen.append(video)
        return critic_loss(video, *args, **kwargs)

    monkeypatch.setattr("trainer.matching.critic_loss", record)
    for _ in range(3):
        trainer.train_step()
        assert seen[-2] is trainer.replay[-1].videos[0]


def test_in_its_head_start_only_the_critic_learns(build):
    trainer = build("dmd.critic_head_start=1", "dmd.replay_rollouts=2")
    generator, critic = copy(trainer.denoiser), copy(trainer.fake_score)
    assert trainer.train_step().keys() == {"critic_loss", "critic_gradient_norm", "critic_lr", "skipped"}
    assert changed(trainer.fake_score, critic) and not changed(trainer.denoiser, generator)
    assert {"generator_loss", "critic_loss"} <= trainer.train_step().keys()
    assert changed(trainer.denoiser, generator)


def test_without_replay_every_critic_update_rolls_out_anew(build, monkeypatch):
    trainer, rollouts = build("dmd.critic_updates=3"), []
    generate = trainer.generation.video

    def count(micro_batch, batch, *, with_grad):
        rollouts.append((with_grad, micro_batch.indices))
        return generate(micro_batch, batch, with_grad=with_grad)

    monkeypatch.setattr(trainer.generation, "video", count)
    trainer.train_step()
    assert rollouts == [(True, range(0, 2)), (False, range(2, 4)), (False, range(4, 6)), (False, range(6, 8))]


@pytest.mark.parametrize("failing", ["matching", "critic"])
def test_a_loss_that_is_not_finite_skips_the_rest_of_its_step_and_nothing_else(build, monkeypatch, failing):
    trainer = build("dmd.replay_rollouts=2")
    trainer.train_step()
    modules = (trainer.denoiser, trainer.fake_score)
    before, replayed = [copy(module) for module in modules], len(trainer.replay)
    (original,) = getattr(trainer, failing)

    def poisoned(micro_batch, video, batch):
        term = original(micro_batch, video, batch)
        return term._replace(loss=term.loss * float("nan" if failing == "matching" else "inf"))

    monkeypatch.setattr(trainer, failing, [poisoned])
    metrics = trainer.train_step()
    assert metrics["skipped"] == 1 and trainer.step == 2
    moved = [changed(module, old) for module, old in zip(modules, before, strict=True)]
    assert moved == [failing == "critic", False]
    assert len(trainer.replay) == replayed + (failing == "critic")
    (record,) = (trainer.context.logdir / "skipped").iterdir()
    assert len(json.loads(record.read_text())["prompts"]) == 2
    monkeypatch.undo()
    assert trainer.train_step()["skipped"] == 1 and all(
        changed(module, old) for module, old in zip(modules, before, strict=True)
    )


def test_a_run_whose_steps_all_fail_ends(build, monkeypatch):
    trainer = build("health.max_skipped=2", "trainer.steps=9")
    bias = trainer.fake_score.transformer.head.head.bias
    monkeypatch.setattr(trainer, "critic", [lambda *_: Term(bias.sum() * float("nan"), {})])
    with pytest.raises(UserError, match="2 steps in a row were skipped"):
        trainer.train()
    assert trainer.step == 2


def test_gradient_reaches_frames_from_the_first_one_asked_for(build):
    for start, expected in ((0, [True, True]), (3, [False, True])):
        trainer = build(f"dmd.grad_start_frame={start}")
        (passes,) = trainer.micro_batches()
        batch = trainer.batch(passes)
        video = trainer.generation.video(passes, batch, with_grad=True).latents
        reached = []
        for chunk in (video[:, :3], video[:, 3:]):
            gradients = torch.autograd.grad(
                chunk.sum(), list(trainer.denoiser.parameters()), retain_graph=True, allow_unused=True
            ) if chunk.requires_grad else []  # fmt: skip
            reached.append(any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients))
        assert reached == expected
        assert not trainer.generation.video(passes, batch, with_grad=False).latents.requires_grad


def test_gradient_steps_and_detach_cache_change_the_gradient_and_not_the_video(build):
    made = {}
    for override in ("dmd.gradient_steps=last", "dmd.gradient_steps=all", "dmd.detach_cache=false"):
        trainer = build(override, "rollout.denoising_steps=[1000,500]", "trainer.seed=7")
        (passes,) = trainer.micro_batches()
        video, facts = trainer.generation.video(passes, trainer.batch(passes), with_grad=True)
        assert facts.next_level == 0, "the rollout must reach the last step"
        weight = trainer.denoiser.transformer.patch_embedding.weight
        (gradient,) = torch.autograd.grad(video[:, 3:].square().sum(), weight)
        made[override] = video.detach(), gradient
    (first, default), *others = made.values()
    for video, gradient in others:
        assert relative_error(video, first) <= 1e-5 and relative_error(gradient, default) > 1e-3


@pytest.mark.parametrize(
    "setting",
    ["rollout.cache_dtype=fp8", "parallel.compile=true", "rollout.relative_positions=true and rollout.sink=1"],
)
def test_a_cache_that_cannot_keep_a_graph_is_refused_before_anything_is_loaded(build, setting):
    overrides = ["student.weights=missing", "dmd.detach_cache=false", *setting.split(" and ")]
    with pytest.raises(UserError, match=f"dmd.detach_cache=false does not work with {setting}; set dmd.detach_cache"):
        build(*overrides)


def test_a_cache_that_is_not_detached_is_refused_with_sharded_weights(build, monkeypatch):
    monkeypatch.setattr(parallelize, "device_mesh", lambda *_: None)
    with pytest.raises(UserError, match=r"does not work with sharded weights; set .* parallel.precision=float32"):
        build("student.weights=missing", "dmd.detach_cache=false", "parallel.precision=bfloat16")


def test_samples_are_made_with_the_average_and_are_the_same_at_every_call(build):
    trainer = build("trainer.ema_decay=0.999", "optimizer.lr=0.1")
    indices = range(len(trainer.sample_prompts))

    def sample() -> Tensor:
        with trainer.ema.applied(), torch.no_grad():
            return trainer.sample_frames(indices)

    before = sample()
    assert torch.equal(sample(), before)
    assert trainer.update_generator().is_applied
    assert torch.equal(sample(), before)
    with torch.no_grad():
        assert not torch.equal(trainer.sample_frames(indices), before)


def test_a_sample_does_not_depend_on_the_batch_it_is_made_in(build):
    trainer = build()
    with torch.no_grad():
        together = trainer.sample_frames([0, 1])
        assert not torch.equal(together[0], together[1])
        for index in (0, 1):
            alone = trainer.sample_frames([index])[0]
            assert torch.allclose(alone, together[index], atol=1e-4)


def test_guidance_dropout_replaces_prompts_by_the_negative_one(build):
    diffusion = ("objective=diffusion", "sampling.negative_prompt=bad", "trainer.batch_size=400")
    prompts = ["a cat"] * 400

    def dropped(share: float) -> list[str]:
        trainer = build(*diffusion, f"diffusion.guidance_dropout={share}")
        return trainer._drop(prompts, *trainer.micro_batches())

    assert set(dropped(0.25)) == {"a cat", "bad"} and 60 < dropped(0.25).count("bad") < 140
    assert dropped(0) == prompts
