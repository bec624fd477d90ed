"""Generates the videos that are scored: by a rollout of the student (Self Forcing), or in one step (CausVid).

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import block_causal_mask, teacher_forcing_mask
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import MAX_TIMESTEP
from model.kv_cache import KVCache
from model.layer_cache import CacheDtype
from pipeline.rollout import randn, rollout
from pipeline.steps import most_steps, steps_of_chunk
from trainer.config import Config
from trainer.data import Contents, TrainingOrder
from trainer.micro_batch import MicroBatch
from trainer.objectives.causvid import denoise_chunks, sample_step_timesteps
from utils.checkpoint import Stateful
from utils.errors import UserError


class Batch(NamedTuple):
    """The training data of a micro-batch."""

    embeds: Tensor
    """Prompt embeddings [B L E]."""
    real: Tensor | None
    """Latents of real videos of these prompts [B F C H W], or of first frames [B 1 C H W]. None if not needed."""


@dataclass(frozen=True)
class VideoFacts:
    """Facts about generated videos that the losses need in addition to the latents."""

    uncounted: int = 0
    """The number of first frames that the generator's loss ignores."""
    uncounted_by_critic: int = 0
    """The number of first frames that the critic's loss ignores."""
    exit_level: float = MAX_TIMESTEP
    """The denoising step at which the rollout stopped, as a timestep before the shift, in (0, 1000]."""
    next_level: float = 0.0
    """The next denoising step, as such a timestep too; 0 after the last step."""


class Video(NamedTuple):
    """Generated videos."""

    latents: Tensor
    """The latents that the scores see [B F C H W]."""
    facts: VideoFacts = VideoFacts()


class Prompts(NamedTuple):
    """The prompts of the videos of a global batch."""

    indices: range
    """Indices in the training data."""
    second: bool = False
    """True if they are the second prompts, from ``data.switch_path``."""


@dataclass(frozen=True)
class Rollouts:
    """The videos that this process generated for one global batch."""

    prompts: Prompts
    videos: list[Tensor]
    """The latents of each pass of this process [B F C H W]."""
    facts: VideoFacts
    """The facts, which are the same for all passes."""


class Generation(ABC):
    """Makes the videos of an update.

    Args:
        config: the whole configuration.
        denoiser: the student.
        codec: decodes and encodes frames for longer rollouts.
        device: where the latents are.
    """

    contents = Contents.prompts
    """The contents that the training data must have."""

    def __init__(self, config: Config, denoiser: Denoiser, codec: VideoCodec, device: torch.device) -> None:
        self.config = config
        self.denoiser = denoiser
        self.codec = codec
        self.device = device

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError if the configuration asks for something impossible. It runs before weights are loaded."""
        check_frames(config, config.video.num_frames)

    def next_prompts(self, data: TrainingOrder, count: int, stream: Callable[..., torch.Generator]) -> Prompts:
        """Choose the prompts of the next ``count`` videos of all processes together.

        Args:
            data: the training data.
            stream: makes a random stream for a purpose, the same on every process.
        """
        return Prompts(data.draw(count))

    def accept(self) -> None:
        """Note that the update for which the last videos were made was applied."""
        return

    @abstractmethod
    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        """Generate the videos of a micro-batch."""

    def stateful(self) -> dict[str, Stateful]:
        """Return the state that a resumed run needs, by name."""
        return {}

    def roll(
        self,
        micro_batch: MicroBatch,
        embeds: Tensor,
        frames: int,
        *,
        grad_start_frame: int | None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, VideoFacts]:
        """Roll out ``frames`` latent frames [B F C H W] for prompts [B L E].

        Every chunk of every video of an update stops at the same random step.

        Args:
            grad_start_frame: first frame with gradient, counted from the start of ``context``. None: no gradient.
            context: given frames before the generated ones [B f C H W].
        """
        config = self.config.rollout
        given = 0 if context is None else context.shape[1]
        shape = (len(embeds), *self.config.video.latent_shape(self.codec, frames))
        last = int(torch.randint(most_steps(config.denoising_steps), (), generator=micro_batch.generator("exit step")))
        blocks = rollout(
            self.denoiser,
            randn(shape, micro_batch.generators("start noise"), embeds),
            embeds,
            KVCache(self.denoiser.transformer.config.num_layers, append_only=True),
            config,
            context_latents=context,
            exit_steps=[last] * len(config.chunks(frames, given)),
            grad_start_frame=grad_start_frame,
            gradient_steps=self.config.dmd.gradient_steps,
            detach_cache=self.config.dmd.detach_cache,
            generator=micro_batch.generators("step noise"),
        )
        return torch.cat([block.latents for block in blocks], dim=1), self._exit_facts(last)

    def _exit_facts(self, last: int) -> VideoFacts:
        config, schedule = self.config.rollout, self.denoiser.schedule
        steps = steps_of_chunk(config.denoising_steps, 0)
        levels = steps if config.warp_denoising_step else [MAX_TIMESTEP * schedule.level(step) for step in steps]
        last = min(last, len(levels) - 1)
        return VideoFacts(exit_level=levels[last], next_level=levels[last + 1] if last + 1 < len(levels) else 0.0)

    def first_with_grad(self, with_grad: bool, skipped: int = 0) -> int | None:
        """Return the first frame with gradient, after ``skipped`` frames without it. None if there is no gradient."""
        return self.config.dmd.grad_start_frame + skipped if with_grad else None


class WholeRollout(Generation):
    """Self Forcing: a rollout of ``video.num_frames`` frames. The scores see all of it."""

    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        frames = self.config.video.num_frames
        return Video(*self.roll(micro_batch, batch.embeds, frames, grad_start_frame=self.first_with_grad(with_grad)))


class RealVideoRollout(WholeRollout):
    """The same rollout, with real videos of the same prompts, which the discriminator compares with it."""

    contents = Contents.clips


class ChunkDenoising(Generation):
    """CausVid: the chunks of real videos are noised independently and denoised in one step."""

    contents = Contents.clips

    def video(self, micro_batch: MicroBatch, batch: Batch, *, with_grad: bool) -> Video:
        config = self.config.rollout
        steps = [*steps_of_chunk(config.timesteps(self.denoiser), 0), *([0.0] if self.config.dmd.clean_step else [])]
        chunks = config.chunks(self.config.video.num_frames)
        timesteps = sample_step_timesteps(micro_batch.total, chunks, steps, micro_batch.generator("steps"))
        clean_context = self.config.dmd.clean_context
        with torch.set_grad_enabled(with_grad):
            latents = denoise_chunks(
                self.denoiser,
                batch.real,
                batch.embeds,
                timesteps=micro_batch.of(timesteps).to(batch.real.device),
                noise=micro_batch.randn("start noise", batch.real),
                block_mask=config.mask(
                    batch.real.shape[1], teacher_forcing_mask if clean_context else block_causal_mask
                ),
                clean_context=clean_context,
            )
        return Video(latents)


def check_cache(config: Config) -> None:
    """Raise UserError if ``dmd.detach_cache=false`` is set with a key that does not let the cache keep a graph."""
    if config.dmd.detach_cache:
        return
    rules = config.rollout
    moved_sink = f"rollout.relative_positions=true and rollout.sink={rules.sink}"
    for found, setting, remedy in (
        (rules.cache_dtype is CacheDtype.fp8, "rollout.cache_dtype=fp8", "rollout.cache_dtype=auto"),
        (rules.relative_positions and rules.sink > 0, moved_sink, "rollout.relative_positions=false"),
        (config.parallel.compile, "parallel.compile=true", "parallel.compile=false"),
    ):
        if found:
            raise UserError(
                f"dmd.detach_cache=false does not work with {setting}; set dmd.detach_cache=true or {remedy}"
            )


def check_frames(config: Config, frames: int, given: int = 0) -> None:
    """Raise UserError if ``frames`` frames after ``given`` ones do not fill whole chunks."""
    try:
        config.rollout.chunks(frames, given)
    except ValueError as error:
        raise UserError(f"rollout: {error}") from None
