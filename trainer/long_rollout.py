"""Self-forcing on rollouts that are longer than what is scored, go on from step to step, or start from an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Config
from trainer.data import Contents
from trainer.micro_batch import MicroBatch
from trainer.objectives.long import draw_length, draw_switch, later_frames, score_window, visible_history
from trainer.parallelize import local_part, own_shape, shard_rows
from trainer.self_forcing import Batch, SelfForcingTrainer
from trainer.trainer import SAMPLE_VIDEOS, RunContext, Update
from utils.checkpoint import Stateful
from utils.errors import UserError


class LongTrainer(SelfForcingTrainer):
    """Rollouts of up to ``long.max_frames`` frames, of which the last ``video.num_frames`` are scored."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        shortest, longest = config.video.num_frames, config.long.max_frames
        if longest < shortest:
            raise UserError(f"long.max_frames={longest} is less than video.num_frames={shortest}, which are scored")
        self.chunks_of(longest)

    def length(self, micro_batch: MicroBatch) -> int:
        """Latent frames rolled out, the same for all samples of an update."""
        config = self.config
        return draw_length(
            config.video.num_frames,
            config.long.max_frames,
            config.rollout.frames_per_chunk,
            micro_batch.generator("frames"),
        )

    def generate(self, micro_batch: MicroBatch, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        frames, scored = self.length(micro_batch), self.config.video.num_frames
        if grad_start_frame is not None:
            grad_start_frame += frames - scored
        video = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=grad_start_frame)
        return score_window(video, scored, self.codec)

    def counted(self, micro_batch: MicroBatch) -> Tensor | None:
        scored = self.config.video.num_frames
        return None if self.length(micro_batch) == scored else later_frames(scored, self.device)


class Past(NamedTuple):
    """Earlier frames of a pass's videos."""

    visible: Tensor
    """Those that the next chunk sees [B F C H W]."""
    latest: Tensor
    """Those of the last step [B F C H W]."""


@dataclass
class Continuation:
    """A rollout in progress, which can be saved."""

    micro_batch: int
    """Samples a pass."""
    device: torch.device
    window: int = 0
    """Steps it has gone through; 0 is before the first."""
    prompts: tuple[range, range] = (range(0), range(0))
    """Data indices of the first prompts, and of those after the switch."""
    past: dict[int, Past] = field(default_factory=dict)
    """By the number of the pass."""

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Where it is, and its frames, sharded over the processes."""
        first, second = self.prompts
        passes = [self.past[number] for number in sorted(self.past)]
        frames = {
            name: shard_rows(torch.cat([getattr(past, name) for past in passes])) for name in Past._fields if passes
        }
        return {"place": [self.window, first.start, second.start, len(first)], **frames}

    def room_for(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Empty frames."""
        return {key: shard_rows(torch.empty(own_shape(value), device=self.device)) for key, value in saved.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | list[int]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.window, first, second, count = state["place"]
        self.prompts = range(first, first + count), range(second, second + count)
        frames = [local_part(state[name]).split(self.micro_batch) for name in Past._fields if name in state]
        self.past = {number: Past(*each) for number, each in enumerate(zip(*frames, strict=True))}


class ContinuedTrainer(SelfForcingTrainer):
    """A rollout goes on from step to step (LongLive): each adds ``video.num_frames`` frames, which are scored.

    The frames that the next ones see are encoded anew at each step, with the weights and the prompt of now: the cache
    holds nothing stale, is no larger than a window and what is added to it, and need not be saved. After
    ``long.windows`` steps a new rollout begins; before a random one of them the prompt changes.
    """

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        if config.dmd.replay_rollouts == 0:
            raise UserError("dmd.replay_rollouts=0 rolls out for the critic alone; a continued rollout needs 1 or more")
        self.progress = Continuation(config.trainer.batch_size, self.device)
        self.window = 0

    def stateful(self) -> dict[str, Stateful]:
        return super().stateful() | {"continuation": self.progress}

    def updates(self) -> Iterator[Update]:
        self.window, self.progress.window = self.progress.window, 0  # stays 0 where an update is skipped
        if self.window == 0:
            self.progress.past = {}
            self.progress.prompts = self.data.draw(self.plan.total), self.data.draw(self.plan.total)
        yield from super().updates()
        self.progress.window = (self.window + 1) % self.config.long.windows

    def next_passes(self) -> list[MicroBatch]:
        """The first prompts of a rollout until the switch, then the second."""
        first, second = self.progress.prompts
        long = self.config.long
        switch = draw_switch(long.windows, long.switch_probability, self.stream("switch", first.start))
        return self.micro_batches(first if self.window < switch else second)

    def generate(self, micro_batch: MicroBatch, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        config, frames, number = self.config.rollout, self.config.video.num_frames, micro_batch.number
        past = self.progress.past.get(number)
        context = None if past is None else past.visible
        if context is not None and grad_start_frame is not None:
            grad_start_frame += context.shape[1]
        video = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=grad_start_frame, context=context)
        known = video.detach() if context is None else torch.cat([context, video.detach()], dim=1)
        visible = visible_history(known, config.frames_per_chunk, config.window, config.sink)
        self.progress.past[number] = Past(visible, video.detach())
        return video if past is None else score_window(torch.cat([past.latest, video], dim=1), frames, self.codec)

    def counted(self, micro_batch: MicroBatch) -> Tensor | None:
        return later_frames(self.config.video.num_frames, self.device) if self.window else None


class ImageTrainer(SelfForcingTrainer):
    """Videos that go on from a given first latent, which the loss leaves out."""

    contents = Contents.first_frames

    def __init__(self, config: Config, context: RunContext) -> None:
        if config.rollout.frames_per_chunk > 1 and not config.rollout.independent_first_frame:
            raise UserError(
                "rollout.independent_first_frame=false: a given frame is a chunk of its own; set it to true"
            )
        super().__init__(config, context)
        shown = self.data.read(range(SAMPLE_VIDEOS))
        self.sample_prompts, self.sample_images = shown.prompts, shown.encode(self.codec, self.device)

    def batch(self, micro_batch: MicroBatch) -> Batch:
        samples = self.data.read(micro_batch.indices)
        return Batch(self.text_encoder.encode(samples.prompts), samples.encode(self.codec, self.device))

    def generate(self, micro_batch: MicroBatch, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        frames = self.config.video.num_frames - 1
        video = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=grad_start_frame, context=batch.real)
        return torch.cat([batch.real, video], dim=1)

    def counted(self, micro_batch: MicroBatch) -> Tensor | None:
        return later_frames(self.config.video.num_frames, self.device)

    def sample_frames(self, prompts: list[str]) -> Tensor:
        embeds = self.text_encoder.encode(prompts)
        return self.sample_rollout(self.denoiser, embeds, self.codec, context=self.sample_images)
