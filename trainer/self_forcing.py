"""Self-forcing training: roll out as at inference, score whole videos, follow the distribution-matching gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.kv_cache import KVCache
from pipeline.loading import load_codec
from pipeline.rollout import randn, rollout
from trainer.config import Config, Objective
from trainer.data import Contents, text_source, training_data
from trainer.micro_batch import MicroBatch
from trainer.objectives.dmd import GeneratorLoss, critic_loss, dmd_loss, sample_score_timesteps
from trainer.objectives.sid import sid_loss
from trainer.parallelize import local_part, own_shape, shard_rows
from trainer.regression import PairRegression
from trainer.trainer import Loss, RunContext, Trainer, Update
from utils.checkpoint import Stateful


class Batch(NamedTuple):
    """What a micro-batch is about."""

    embeds: Tensor
    """Prompt embeddings [B L E]."""
    real: Tensor | None
    """Latents of real videos of these prompts [B F C H W], for objectives that look at any."""


class Rollouts(NamedTuple):
    """Generated videos of a global batch: those of this process."""

    batch: range
    """Indices in the training data, of all processes."""
    videos: list[Tensor]
    """Of each of its passes [B F C H W]."""


class Replay(deque[Rollouts]):
    """The latest rollouts, which can be saved: their prompts and real videos are those of the data's indices."""

    def __init__(self, length: int, micro_batch: int, device: torch.device) -> None:
        super().__init__(maxlen=length)
        self.micro_batch = micro_batch
        self.device = device

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """First data index and number of samples of each, and its videos, sharded over the processes."""
        videos = {str(index): shard_rows(torch.cat(each.videos)) for index, each in enumerate(self)}
        return {"batches": [[each.batch.start, len(each.batch)] for each in self], **videos}

    def room_for(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Empty videos."""
        return {key: shard_rows(torch.empty(own_shape(value), device=self.device)) for key, value in saved.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | list]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.clear()
        for index, (start, count) in enumerate(state["batches"]):
            videos = local_part(state[str(index)]).split(self.micro_batch)
            self.append(Rollouts(range(start, start + count), list(videos)))


class SelfForcingTrainer(Trainer):
    """One generator update and several critic updates a step (Self Forcing, Algorithm 1), with DMD or SiD."""

    contents = Contents.prompts

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.denoiser = self.load_trained(config.student)
        self.real_score = self.load_frozen(config.real_score)
        self.fake_score = self.load_trained(config.fake_score or config.real_score, config.critic_lora)
        self.text_encoder = text_source(config.data, config.text_encoder, self.device)
        self.codec = load_codec(config.codec, device=self.device)
        self.data = training_data(
            config.data, self.contents, seed=self.seed("data"), video=config.video, codec=self.codec
        )
        self.chunks = self.chunks_of(config.video.num_frames)
        self.regression = PairRegression(config, self.seed("regression")) if config.dmd.regression_weight else None
        self.replay = Replay(max(1, config.dmd.replay_rollouts), config.trainer.batch_size, self.device)
        steps = config.trainer.steps
        self.track(generator=self.denoiser.transformer)
        self.keep(critic=self.fake_score.transformer)
        self.updater = self.optimize("generator", self.denoiser, config.optimizer, steps)
        self.critic_updater = self.optimize(
            "critic", self.critic(), config.critic_optimizer, steps * config.dmd.critic_updates
        )

    def critic(self) -> nn.Module:
        """What the critic's optimizer trains."""
        return self.fake_score

    def stateful(self) -> dict[str, Stateful]:
        return super().stateful() | {"replay": self.replay}

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """The prompts of a micro-batch."""
        return Batch(self.text_encoder.encode(self.data.read(micro_batch.indices).prompts), None)

    def updates(self) -> Iterator[Update]:
        leads = self.step < self.config.dmd.critic_head_start
        if not leads:
            passes, videos = self.next_passes(), []
            yield Update(self.updater, partial(self.generator_update, videos), passes)
            self.replay.append(Rollouts(passes[0].batch, videos))
        for number in range(self.config.dmd.critic_updates):
            if self.config.dmd.replay_rollouts == 0 or (leads and number == 0):
                self.replay.append(self.roll_out(self.next_passes()))
            rollouts = self.replay[-1 if number == 0 else self.replayed(number)]
            passes = self.micro_batches(rollouts.batch)
            yield Update(self.critic_updater, partial(self.critic_update, rollouts), passes, prefix="critic_")

    def next_passes(self) -> list[MicroBatch]:
        """What the next rollout is about."""
        return self.micro_batches()

    def generator_update(self, videos: list[Tensor], micro_batch: MicroBatch) -> Loss:
        """Score a rollout with gradient as a whole; appends it to ``videos``."""
        with self.clock.phase("data"):
            batch = self.batch(micro_batch)
        with self.clock.phase("rollout"):
            video = self.generate(micro_batch, batch, grad_start_frame=self.config.dmd.grad_start_frame)
        videos.append(video.detach())
        with self.clock.phase("scores"):
            loss, score_gradient = self.generator_loss(micro_batch, video, batch)
        variance = videos[-1].float().var(dim=(1, 2, 3, 4)).mean()
        metrics = {"generator_loss": loss.detach(), "score_gradient": score_gradient, "sample_variance": variance}
        if self.regression is not None:
            term = self.regression.loss(self.denoiser, micro_batch, self.text_encoder)
            loss = loss + self.config.dmd.regression_weight * term
            metrics["regression_loss"] = term.detach()
        return Loss(loss, metrics)

    def critic_update(self, rollouts: Rollouts, micro_batch: MicroBatch) -> Loss:
        """The critic's loss on replayed videos."""
        with self.clock.phase("data"):
            batch = self.batch(micro_batch)
        with self.clock.phase("critic"):
            loss = self.critic_loss(micro_batch, rollouts.videos[micro_batch.number], batch)
        return Loss(loss, {"critic_loss": loss.detach()})

    def roll_out(self, micro_batches: list[MicroBatch]) -> Rollouts:
        """Videos for the critic alone."""
        with self.clock.phase("rollout"):
            videos = [self.generate(each, self.batch(each), grad_start_frame=None) for each in micro_batches]
        return Rollouts(micro_batches[0].batch, videos)

    def replayed(self, number: int) -> int:
        """Which rollouts critic update ``number`` of this step draws."""
        return int(torch.randint(len(self.replay), (), generator=self.stream("replay", self.step, number)))

    def generator_loss(self, micro_batch: MicroBatch, video: Tensor, batch: Batch) -> GeneratorLoss:
        """Distribution matching of generated videos [B F C H W]."""
        config = self.config
        match = dmd_loss
        if config.objective is Objective.self_forcing_sid:
            match = partial(sid_loss, alpha=config.sid.alpha)
        negative = self.text_encoder.encode([config.sampling.negative_prompt] * len(batch.embeds))
        return match(
            video,
            self.real_score,
            self.fake_score,
            batch.embeds,
            negative,
            **self.score_noise(micro_batch, "score", video),
            real_guidance_scale=config.dmd.real_guidance_scale,
            counted=self.counted(micro_batch),
        )

    def counted(self, micro_batch: MicroBatch) -> Tensor | None:
        """Which frames [F] bool of a scored video the generator's loss counts; None is all of them."""
        return None

    def critic_loss(self, micro_batch: MicroBatch, video: Tensor, batch: Batch) -> Tensor:
        """Flow matching of the fake score on generated videos [B F C H W]."""
        return critic_loss(
            video,
            self.fake_score,
            batch.embeds,
            **self.score_noise(micro_batch, "critic", video),
            sigma_floor=self.config.dmd.sigma_floor,
        )

    def generate(self, micro_batch: MicroBatch, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        """Whole videos [B F C H W]."""
        frames = self.config.video.num_frames
        return self.roll(micro_batch, batch.embeds, frames, grad_start_frame=grad_start_frame)

    def roll(
        self,
        micro_batch: MicroBatch,
        embeds: Tensor,
        frames: int,
        *,
        grad_start_frame: int | None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Roll out ``frames`` latent frames [B F C H W] of prompts [B L E].

        Every chunk of every video of an update stops at one random step.

        Args:
            grad_start_frame: first frame with gradient, given ones counted; None is none.
            context: given frames before them [B f C H W].
        """
        config = self.config.rollout
        given = 0 if context is None else context.shape[1]
        shape = (len(embeds), *self.config.video.latent_shape(self.codec, frames))
        exits = torch.randint(len(config.denoising_steps), (), generator=micro_batch.generator("exit step"))
        blocks = rollout(
            self.denoiser,
            randn(shape, micro_batch.generators("start noise"), embeds),
            embeds,
            KVCache(self.denoiser.transformer.config.num_layers, append_only=True),
            config,
            context_latents=context,
            exit_steps=[int(exits)] * len(config.chunks(frames, given)),
            grad_start_frame=grad_start_frame,
            generator=micro_batch.generators("step noise"),
        )
        return torch.cat([block.latents for block in blocks], dim=1)

    def score_noise(self, micro_batch: MicroBatch, purpose: str, video: Tensor) -> dict[str, Tensor]:
        """A noise level a video and the noise, for any loss."""
        drawn = sample_score_timesteps(
            micro_batch.total, self.denoiser.schedule, micro_batch.generator(f"{purpose} timesteps")
        )
        return {
            "timesteps": micro_batch.of(drawn).to(self.device),
            "noise": micro_batch.randn(f"{purpose} noise", video),
        }

    def sample_frames(self, prompts: list[str]) -> Tensor:
        return self.sample_rollout(self.denoiser, self.text_encoder.encode(prompts), self.codec)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
