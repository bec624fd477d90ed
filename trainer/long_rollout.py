"""Rollouts that are longer than the scored window, continue from update to update, or start from an image.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from trainer.config import Config
from trainer.data import Contents, TrainingOrder
from trainer.generation import Batch, Generation, Prompts, Video, check_frames
from trainer.micro_batch import MicroBatch
from trainer.objectives.long import draw_length, draw_switch, score_window, visible_history
from trainer.parallelize import local_part, own_shape, shard_rows
from utils.checkpoint import Stateful
from utils.errors import UserError


class LongRollout(Generation):
    """Rollouts of up to ``long.max_frames`` frames. The last ``video.num_frames`` of them are scored."""

    @classmethod
    def check(cls, config: Config) -> None:
        shortest, longest = config.video.num_frames, config.long.max_frames
        if longest < shortest:
            raise UserError(f"long.max_frames={longest} is less than video.num_frames={shortest}, which are scored")
        check_frames(config, shortest)
        check_frames(config, longest)

    def length(self, micro_batch: MicroBatch) -> int:
        """Return the latent frames of the rollout. They are the same for all samples of an update."""
        config = self.config
        return draw_length(
            config.video.num_frames,
            config.long.max_frames,
            config.rollout.frames_per_chunk,
            micro_batch.generator("frames"),
        )

    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        frames, scored = self.length(micro_batch), self.config.video.num_frames
        start = self.first_with_grad(with_grad, frames - scored)
        latents, facts = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=start)
        if frames > scored:
            facts = replace(facts, uncounted=first_chunk(self.config))
        return Video(score_window(latents, scored, self.codec), facts)


def first_chunk(config: Config) -> int:
    """Return the number of frames in the first chunk of a clip."""
    return 1 if config.rollout.independent_first_frame else config.rollout.frames_per_chunk


class Past(NamedTuple):
    """The earlier frames of the videos of one pass."""

    visible: Tensor
    """The frames that the next chunk sees [B F C H W]."""
    latest: Tensor
    """The last ``video.num_frames`` frames [B F C H W]."""


@dataclass
class Continuation:
    """A rollout that continues from update to update. It can be saved."""

    micro_batch: int
    """Samples of a pass."""
    device: torch.device
    window: int = 0
    """The number of the current or next window. 0 begins a new rollout."""
    open: bool = False
    """True if a window was begun but its update was not applied."""
    prompts: tuple[range, range] = (range(0), range(0))
    """Data indices of the first prompts, and of the prompts after the switch."""
    past: dict[int, Past] = field(default_factory=dict)
    """The earlier frames, by the number of the pass."""

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Return the place in the rollout, and its frames, sharded over the processes."""
        first, second = self.prompts
        passes = [self.past[number] for number in sorted(self.past)]
        frames = {
            name: shard_rows(torch.cat([getattr(past, name) for past in passes])) for name in Past._fields if passes
        }
        return {"place": [self.window, int(self.open), first.start, second.start, len(first)], **frames}

    def room_for(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return empty tensors for saved frames."""
        return {key: shard_rows(torch.empty(own_shape(value), device=self.device)) for key, value in saved.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | list[int]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.window, is_open, first, second, count = state["place"]
        self.open = bool(is_open)
        self.prompts = range(first, first + count), range(second, second + count)
        frames = [local_part(state[name]).split(self.micro_batch) for name in Past._fields if name in state]
        self.past = {number: Past(*each) for number, each in enumerate(zip(*frames, strict=True))}


class ContinuedRollout(Generation):
    """LongLive: every update, of the generator or of the critic, makes the next window of a rollout.

    The first window has ``video.num_frames`` frames. A later window adds new frames to the last ``long.overlap``
    frames, so the scores again see ``video.num_frames``. Only the new frames count in the losses. After
    ``long.windows`` windows a new rollout begins. The prompt changes before a random window.

    At the start of every window, the frames that the next chunk sees are encoded again, with the current weights and
    prompt. Their positions are counted from the first of them. So the cache has no stale entries, its size is limited
    to the visible frames and the window, and it is not saved. (The official code keeps the cache from window to window
    and encodes it again only at the switch.)
    """

    def __init__(self, config: Config, denoiser: Denoiser, codec: VideoCodec, device: torch.device) -> None:
        super().__init__(config, denoiser, codec, device)
        self.progress = Continuation(config.trainer.batch_size, device)

    @classmethod
    def check(cls, config: Config) -> None:
        frames, overlap = config.video.num_frames, cls.overlap(config)
        if not 1 <= overlap < frames:
            raise UserError(f"long.overlap={overlap} must be at least 1 and less than video.num_frames={frames}")
        check_frames(config, frames)
        check_frames(config, frames - overlap, given=overlap)

    @staticmethod
    def overlap(config: Config) -> int:
        """Return how many frames of a window come from the window before it."""
        return first_chunk(config) if config.long.overlap is None else config.long.overlap

    def stateful(self) -> dict[str, Stateful]:
        return {"continuation": self.progress}

    def next_prompts(self, data: TrainingOrder, count: int, stream: Callable[..., torch.Generator]) -> Prompts:
        """Return the first prompts of the rollout, or the second ones after the switch. Begin a new rollout if due.

        If the last update of a rollout was skipped, the rollout ends, because its frames may not be finite.
        """
        progress, long = self.progress, self.config.long
        if progress.open or progress.window == 0:
            first = data.draw(count)
            paired = self.config.data.switch_path is not None
            progress.window, progress.past = 0, {}
            progress.prompts = first, first if paired else data.draw(count)
        progress.open = True
        first, second = progress.prompts
        generator = stream("switch", first.start)
        switched = progress.window >= draw_switch(
            long.windows, long.switch_probability, generator, last=long.last_switch
        )
        return Prompts(second if switched else first, second=switched)

    def accept(self) -> None:
        if self.progress.open:
            self.progress.window = (self.progress.window + 1) % self.config.long.windows
            self.progress.open = False

    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        frames, number, past = (
            self.config.video.num_frames,
            micro_batch.number,
            self.progress.past.get(micro_batch.number),
        )
        if past is None:
            start = self.first_with_grad(with_grad)
            latents, facts = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=start)
            self.progress.past[number] = Past(self._visible(latents.detach()), latents.detach())
            return Video(latents, facts)
        overlap = self.overlap(self.config)
        start = max(0, self.config.dmd.grad_start_frame - overlap) + past.visible.shape[1] if with_grad else None
        latents, facts = self.roll(
            micro_batch, batch.embeds, frames - overlap, grad_start_frame=start, context=past.visible
        )
        known = torch.cat([past.visible, latents.detach()], dim=1)
        joined = torch.cat([past.latest, latents], dim=1)
        self.progress.past[number] = Past(self._visible(known), joined[:, -frames:].detach())
        facts = replace(facts, uncounted=overlap, uncounted_by_critic=overlap)
        return Video(score_window(joined, frames, self.codec), facts)

    def _visible(self, known: Tensor) -> Tensor:
        config = self.config.rollout
        return visible_history(known, config.frames_per_chunk, config.window, config.sink)


class ImageRollout(Generation):
    """Videos that continue a given first latent. The loss ignores that latent."""

    contents = Contents.first_frames

    @classmethod
    def check(cls, config: Config) -> None:
        if config.rollout.frames_per_chunk > 1 and not config.rollout.independent_first_frame:
            raise UserError(
                "rollout.independent_first_frame=false: a given frame is a chunk of its own; set it to true"
            )
        check_frames(config, config.video.num_frames)

    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        frames, start = self.config.video.num_frames - 1, self.first_with_grad(with_grad)
        latents, facts = self.roll(micro_batch, batch.embeds, frames, grad_start_frame=start, context=batch.real)
        return Video(torch.cat([batch.real, latents], dim=1), replace(facts, uncounted=1))
