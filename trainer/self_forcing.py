"""Distillation on generated videos: roll out as at inference, score whole videos, follow the gradient of the scores.

A method has three parts (:data:`METHODS`): how the videos are generated, what the generator learns from them, and what
the critic learns from them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.loading import load_codec
from trainer.config import Config, Objective
from trainer.data import Contents, text_source, training_data
from trainer.generation import (
    Batch,
    ChunkDenoising,
    Generation,
    Prompts,
    RealVideoRollout,
    Rollouts,
    Video,
    VideoFacts,
    WholeRollout,
    check_cache,
)
from trainer.long_rollout import ContinuedRollout, ImageRollout, LongRollout
from trainer.matching import (
    AdversarialMatching,
    CriticDenoising,
    Discrimination,
    DistributionMatching,
    LossTerm,
    Networks,
    Term,
    TrajectoryRegression,
    critic_module,
    discriminator_on,
)
from trainer.micro_batch import MicroBatch
from trainer.parallelize import local_part, own_shape, shard_rows
from trainer.trainer import SAMPLE_VIDEOS, RunContext, Trainer
from trainer.update import Loss, Updated
from utils.checkpoint import Stateful
from utils.errors import UserError

MakeTerm = Callable[[Networks], LossTerm]


@dataclass(frozen=True)
class Method:
    """The parts of a distillation method. The terms of a loss are added."""

    generation: type[Generation]
    matching: tuple[MakeTerm, ...]
    """Terms of the generator's loss."""
    critic: tuple[MakeTerm, ...]
    """Terms of the critic's loss."""

    @property
    def has_teacher(self) -> bool:
        """True if a term uses the real score."""
        return self.matching != (AdversarialMatching,)

    @property
    def has_discriminator(self) -> bool:
        """True if a term uses a discriminator."""
        return AdversarialMatching in self.matching


DMD, SID = DistributionMatching, partial(DistributionMatching, sid=True)
METHODS: dict[Objective, Method] = {
    Objective.self_forcing_dmd: Method(WholeRollout, (DMD,), (CriticDenoising,)),
    Objective.self_forcing_sid: Method(WholeRollout, (SID,), (CriticDenoising,)),
    Objective.self_forcing_gan: Method(RealVideoRollout, (AdversarialMatching,), (Discrimination,)),
    Objective.self_forcing_dmd_gan: Method(
        RealVideoRollout, (DMD, AdversarialMatching), (CriticDenoising, Discrimination)
    ),
    Objective.self_forcing_long: Method(LongRollout, (DMD,), (CriticDenoising,)),
    Objective.self_forcing_continued: Method(ContinuedRollout, (DMD,), (CriticDenoising,)),
    Objective.self_forcing_image: Method(ImageRollout, (DMD,), (CriticDenoising,)),
    Objective.causvid: Method(ChunkDenoising, (DMD,), (CriticDenoising,)),
}


class Replay(deque[Rollouts]):
    """The latest rollouts. They can be saved: data indices are enough to find their prompts and real videos again."""

    def __init__(self, length: int, micro_batch: int, device: torch.device) -> None:
        super().__init__(maxlen=length)
        self.micro_batch = micro_batch
        self.device = device

    def state_dict(self) -> dict[str, Tensor | list]:
        """Return the prompts of each rollout, and its videos, sharded over the processes."""
        videos = {str(index): shard_rows(torch.cat(each.videos)) for index, each in enumerate(self)}
        about = [
            [each.prompts.indices.start, len(each.prompts.indices), int(each.prompts.second), *astuple(each.facts)]
            for each in self
        ]
        return {"batches": about, **videos}

    def room_for(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return empty tensors for saved videos."""
        return {key: shard_rows(torch.empty(own_shape(value), device=self.device)) for key, value in saved.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | list]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.clear()
        for index, (start, count, second, *facts) in enumerate(state["batches"]):
            videos = list(local_part(state[str(index)]).split(self.micro_batch))
            prompts = Prompts(range(start, start + count), bool(second))
            self.append(Rollouts(prompts, videos, VideoFacts(*facts)))


class SelfForcingTrainer(Trainer):
    """Makes one generator update and several critic updates a step (Self Forcing, Algorithm 1)."""

    def __init__(self, config: Config, context: RunContext) -> None:
        method = METHODS[config.objective]
        method.generation.check(config)
        check_cache(config)
        super().__init__(config, context)
        if self.parallelism.active and not config.dmd.detach_cache:
            raise UserError(
                "dmd.detach_cache=false does not work with sharded weights; set dmd.detach_cache=true, or train in one "
                "process with parallel.precision=float32 and without parallel.offload_teacher and offload_trained"
            )
        self.denoiser = self.load_trained(config.student)
        self.real_score = self.load_frozen(config.real_score) if method.has_teacher else None
        self.fake_score = self.load_trained(config.fake_score or config.real_score, config.critic_lora)
        self.text_encoder = text_source(config.data, config.text_encoder, self.device)
        self.codec = load_codec(config.codec, device=self.device)
        self.data = training_data(
            config.data, method.generation.contents, seed=self.seed("data"), video=config.video, codec=self.codec
        )
        self.generation = method.generation(config, self.denoiser, self.codec, self.device)
        networks = self._networks(method)
        matching = method.matching + ((TrajectoryRegression,) if config.dmd.regression_weight else ())
        self.matching = [make(networks) for make in matching]
        self.critic = [make(networks) for make in method.critic]
        self.replay = Replay(max(1, config.dmd.replay_rollouts), config.trainer.batch_size, self.device)
        self.sample_images = self._sample_images()
        steps = config.trainer.steps
        self.track(generator=self.denoiser.transformer)
        self.keep(critic=self.fake_score.transformer)
        self.updater = self.optimize("generator", self.denoiser, config.optimizer, steps)
        self.critic_updater = self.optimize(
            "critic", critic_module(networks), config.critic_optimizer, steps * config.dmd.critic_updates
        )

    def _networks(self, method: Method) -> Networks:
        discriminator = None
        if method.has_discriminator:
            discriminator = discriminator_on(self.fake_score, self.config, self.stream("heads"), self.device)
            self.keep(discriminator_heads=discriminator.heads)
        return Networks(
            self.config,
            self.denoiser,
            self.fake_score,
            self.real_score,
            discriminator,
            self.text_encoder,
            self.device,
            self.seed,
        )

    def _sample_images(self) -> Tensor | None:
        """Return the first latents of the sample videos if they start from images, and set their prompts too."""
        if self.generation.contents is not Contents.first_frames:
            return None
        shown = self.data.read(range(SAMPLE_VIDEOS))
        self.sample_prompts = shown.prompts
        return shown.encode(self.codec, self.device)

    def stateful(self) -> dict[str, Stateful]:
        return super().stateful() | {"replay": self.replay} | self.generation.stateful()

    def batch(self, micro_batch: MicroBatch, *, second_prompts: bool = False) -> Batch:
        """Return the prompts of a micro-batch, and the real videos or images that the method needs."""
        samples = self.data.read(micro_batch.indices)
        prompts = samples.second_prompts if second_prompts and samples.second_prompts else samples.prompts
        reads_videos = self.generation.contents is not Contents.prompts
        real = samples.encode(self.codec, self.device) if reads_videos else None
        return Batch(self.text_encoder.encode(prompts), real)

    def updates(self) -> list[Updated]:
        leads = self.step < self.config.dmd.critic_head_start
        done = [] if leads else [self.update_generator()]
        for number in range(self.config.dmd.critic_updates):
            if done and not done[-1].is_applied:
                break
            done.append(self.update_critic(number, needs_rollout=leads and number == 0))
        return done

    def update_generator(self) -> Updated:
        """Update the generator on new videos. If the update was applied, keep the videos for the critic."""
        prompts = self.next_prompts()
        passes = self.micro_batches(prompts.indices)
        done = self.update(self.updater, partial(self.generator_loss, prompts), passes)
        if done.is_applied:
            self.generation.accept()
            videos: list[Video] = done.outputs
            self.replay.append(Rollouts(prompts, [video.latents for video in videos], videos[0].facts))
        return done

    def update_critic(self, number: int, *, needs_rollout: bool = False) -> Updated:
        """Make critic update ``number`` of this step, on new or on replayed videos."""
        if self.config.dmd.replay_rollouts == 0 or needs_rollout:
            self.replay.append(self.roll_out())
        rollouts = self.replay[-1 if number == 0 else self.replayed(number)]
        passes = self.micro_batches(rollouts.prompts.indices)
        done = self.update(self.critic_updater, partial(self.critic_loss, rollouts), passes, prefix="critic_")
        if done.is_applied:
            self.generation.accept()
        return done

    def next_prompts(self) -> Prompts:
        """Choose the prompts of the next rollout."""
        return self.generation.next_prompts(self.data, self.plan.total, self.stream)

    def generator_loss(self, prompts: Prompts, micro_batch: MicroBatch) -> Loss:
        """Generate videos with gradient and score them as a whole. The output is the videos without gradient."""
        with self.clock.phase("data"):
            batch = self.batch(micro_batch, second_prompts=prompts.second)
        with self.clock.phase("rollout"):
            video = self.generation.video(micro_batch, batch, with_grad=True)
        with self.clock.phase("scores"):
            total, metrics = added([term(micro_batch, video, batch) for term in self.matching])
        made = video._replace(latents=video.latents.detach())
        variance = made.latents.float().var(dim=(1, 2, 3, 4)).mean()
        return Loss(total, {"generator_loss": total.detach(), **metrics, "sample_variance": variance}, made)

    def critic_loss(self, rollouts: Rollouts, micro_batch: MicroBatch) -> Loss:
        """Return the critic's loss on generated videos."""
        with self.clock.phase("data"):
            batch = self.batch(micro_batch, second_prompts=rollouts.prompts.second)
        with self.clock.phase("critic"):
            video = Video(rollouts.videos[micro_batch.number], rollouts.facts)
            total, metrics = added([term(micro_batch, video, batch) for term in self.critic])
        return Loss(total, {"critic_loss": total.detach(), **metrics})

    def roll_out(self) -> Rollouts:
        """Generate videos only for the critic."""
        prompts = self.next_prompts()
        with self.clock.phase("rollout"):
            videos = [
                self.generation.video(each, self.batch(each, second_prompts=prompts.second), with_grad=False)
                for each in self.micro_batches(prompts.indices)
            ]
        return Rollouts(prompts, [video.latents for video in videos], videos[0].facts)

    def replayed(self, number: int) -> int:
        """Return the place of the rollouts that critic update ``number`` of this step uses."""
        return int(torch.randint(len(self.replay), (), generator=self.stream("replay", self.step, number)))

    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        embeds = self.sample_embeds(self.text_encoder, indices)
        given = None if self.sample_images is None else self.sample_images[list(indices)]
        return self.sample_rollout(indices, self.denoiser, embeds, self.codec, context=given)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)


def added(terms: list[Term]) -> Term:
    """Add the terms of a loss."""
    metrics = {name: value for term in terms for name, value in term.metrics.items()}
    return Term(sum(term.loss for term in terms), metrics)
