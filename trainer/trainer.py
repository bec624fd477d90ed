"""The loop that all trainers share: accumulate, clip, step, average, log, sample, save."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.prompt_cache import PromptCache
from model.weights import save_folder, save_torch
from model.weights.lora import save_lora
from pipeline.config import DenoiserConfig
from pipeline.loading import load_denoiser
from pipeline.rollout import rollout
from trainer.config import Config
from trainer.data import TrainingOrder
from trainer.ema import EMA
from trainer.health import Health
from trainer.lora import LoRAConfig, add_lora, merge
from trainer.micro_batch import MicroBatch, plan_batches
from trainer.optimizer import Optimizer, OptimizerConfig
from trainer.parallelize import Parallelism, full_state
from trainer.resume import CHECKPOINTS
from trainer.samples import make_together
from trainer.stored_data import StoredEmbeddings
from trainer.update import Loss, Updated, make_update, mean_metrics
from utils.checkpoint import Checkpoints, KeepPolicy, Stateful, load_checkpoint
from utils.config import save_config, to_dict
from utils.distributed import Ranks, any_process, stop_signals
from utils.errors import UserError
from utils.previews import save_contact_sheet
from utils.prompts import read_prompts
from utils.seeds import derive_seed, random_stream
from utils.timer import Stopwatch
from utils.tracking import Tracker, duration, peak_memory, progress
from utils.transfer import send
from utils.video.write import VideoWriter

log = logging.getLogger(__name__)

SAMPLE_VIDEOS = 8


@dataclass
class RunContext:
    """The folder, device and processes of a run."""

    logdir: Path
    device: torch.device
    ranks: Ranks
    tracker: Tracker
    checkpoint: Path | None = None
    """The checkpoint to resume from."""


class Trainer(ABC):
    """Trains modules, averages some of them, and exports them for inference.

    A subclass builds its parts and :attr:`data` in ``__init__``, names them with :meth:`track`, :meth:`keep` and
    :meth:`optimize`, and implements :meth:`updates`, :meth:`sample_frames` and :meth:`export`. It computes losses; this
    class and :mod:`trainer.update` accumulate, clip, skip, apply, log and save.
    """

    data: TrainingOrder
    ema: EMA

    def __init__(self, config: Config, context: RunContext) -> None:
        self.config = config
        self.context = context
        self.device = context.device
        self.is_main = context.ranks.is_main
        self.step = 0
        self.plan = plan_batches(config.trainer.batch_size, config.trainer.total_batch_size, context.ranks)
        self.parallelism = Parallelism(config.parallel, context.device, context.ranks)
        self.clock = Stopwatch(context.device)
        self.health = Health(config.health, context.logdir / "skipped", is_main=self.is_main)
        self.trained: dict[str, nn.Module] = {}
        self.averaged_names: list[str] = []
        self.optimizers: dict[str, Optimizer] = {}
        self._numbers = count()
        self.sample_prompts = read_prompts(config.data.sample_prompts)[:SAMPLE_VIDEOS]
        log.info(
            "%s: %d steps of %d clips on %s, %d process%s, into %s; loading the models",
            config.objective.value, config.trainer.steps, self.plan.total, context.device,
            context.ranks.world_size, "es" * (context.ranks.world_size > 1), context.logdir,
        )  # fmt: skip
        if self.is_main:
            save_config(config, context.logdir / "config.yaml")

    def seed(self, *parts: int | str) -> int:
        """Return a seed for a purpose. It is the same on every process."""
        return derive_seed(self.config.trainer.seed, *parts)

    def stream(self, *parts: int | str) -> torch.Generator:
        """Return a random stream for a purpose. It is the same on every process."""
        return random_stream(self.config.trainer.seed, *parts)

    def load_trained(self, config: DenoiserConfig, lora: LoRAConfig | None = None) -> Denoiser:
        """Load a denoiser to train, in float32, distributed over the processes. ``lora`` replaces the run's own."""
        device, lora = self.parallelism.loading_device, lora or self.config.lora
        dtype = self.parallelism.loading_dtype(torch.float32, merges=config.lora is not None)
        denoiser = load_denoiser(config, device=device, dtype=dtype, generator=self.stream("weights"))
        if lora.rank:
            add_lora(denoiser.transformer, lora, self.stream("lora"))
        return self.parallelism.trained(denoiser)

    def load_frozen(self, config: DenoiserConfig) -> Denoiser:
        """Load a denoiser that is not trained, in the dtype of its passes, distributed over the processes."""
        dtype = self.parallelism.loading_dtype(self.parallelism.dtype, merges=config.lora is not None)
        return self.parallelism.frozen(load_denoiser(config, device=self.parallelism.loading_device, dtype=dtype))

    def track(self, **modules: nn.Module) -> None:
        """Name the modules that the run trains for inference: they are saved, and so is their average."""
        self.keep(**modules)
        self.averaged_names = list(modules)
        loop = self.config.trainer
        self.ema = EMA(nn.ModuleDict(modules), loop.ema_decay, loop.ema_start_step)
        self.ema.warn_if_young(loop.steps)

    def keep(self, **modules: nn.Module) -> None:
        """Name modules that are trained but not averaged: they are saved."""
        self.trained |= modules

    def optimize(self, name: str, module: nn.Module, config: OptimizerConfig, steps: int) -> Optimizer:
        """Make the optimizer of a module. It is saved as ``name``."""
        self.optimizers[name] = Optimizer(module, config, steps)
        return self.optimizers[name]

    def stateful(self) -> dict[str, Stateful]:
        """Return all state that a resumed run needs except the step, by name. Random streams depend on the step."""
        return {
            **{f"model.{name}": module for name, module in self.trained.items()},
            **{f"optimizer.{name}": optimizer for name, optimizer in self.optimizers.items()},
            "ema": self.ema,
            "data": self.data,
            "health": self.health,
        }

    def micro_batches(self, batch: range | None = None) -> list[MicroBatch]:
        """Return the passes of this process in the next update, with new random numbers and, by default, new data.

        Args:
            batch: the data indices of an earlier global batch.
        """
        seed = self.seed("update", self.step, next(self._numbers))
        return self.plan.divide(self.data.draw(self.plan.total) if batch is None else batch, seed)

    def chunks_of(self, frames: int) -> list[tuple[int, int]]:
        """Return the frame ranges of a clip's chunks. UserError if the frames do not fill whole chunks."""
        try:
            return self.config.rollout.chunks(frames)
        except ValueError as error:
            raise UserError(f"rollout: {error}") from None

    @abstractmethod
    def updates(self) -> list[Updated]:
        """Make the updates of one step with :meth:`update`, in order, and stop after one that was not applied."""

    def update(
        self,
        optimizer: Optimizer,
        loss: Callable[[MicroBatch], Loss],
        micro_batches: list[MicroBatch],
        *,
        prefix: str = "",
    ) -> Updated:
        """Step one optimizer once: see :func:`trainer.update.make_update`."""
        every_pass = self.config.parallel.reduce_every_pass
        options = {"clock": self.clock, "prefix": prefix, "reduce_every_pass": every_pass}
        return make_update(optimizer, loss, micro_batches, **options)

    @abstractmethod
    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        """Make videos of ``sample_prompts`` with the present weights: [B F 3 H W] in [-1, 1].

        A video depends only on its index, not on the other videos; see :meth:`sample_noise`.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the averaged modules as folders that :mod:`pipeline.loading` reads."""

    def train(self) -> None:
        """Run the training from the current step to its end.

        A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) to any process ends it early: the step is finished and saved.
        """
        loop = self.config.trainer
        checkpoints = self._checkpoints()
        with stop_signals() as stop, self._bar() as bar:
            self.resume()
            bar.update(self.step)
            first = self.step + 1
            while self.step < loop.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                self.report(metrics, time.perf_counter() - started, said=self.step == first)
                bar.update(1)
                if any_process(stop.received is not None) and self.step < loop.steps:
                    self.save(checkpoints)
                    checkpoints.finish()
                    log.info(
                        "stopped after step %d because of a signal; the same command goes on from there", self.step
                    )
                    return
                if self.due(loop.sample_every):
                    self.sample()
                if self.due(loop.save_every):
                    self.save(checkpoints)
                if loop.export_every and self.step % loop.export_every == 0:
                    with self._going_on("export"):
                        self.export_checkpoint(self.context.logdir / f"model_{self.step:06d}.pt")
                checkpoints.finish(wait=False)
            checkpoints.finish()
            self.finish()

    def _bar(self) -> tqdm:
        return progress(self.config.trainer.steps, self.config.objective.value, unit="step", is_main=self.is_main)

    def finish(self) -> None:
        """Write the trained models for inference.

        Raises:
            UserError: the models cannot be written.
        """
        folder = self.context.logdir / "model"
        try:
            self.export_checkpoint(self.context.logdir / "model.pt")
            self.export(folder)
            if self.is_main:
                save_config(self.config, folder / "config.yaml")
        except OSError as error:
            raise UserError(
                f"the model cannot be written to {folder}: {error.strerror or error}; make room and start the same "
                "command again: it goes on from the last checkpoint"
            ) from error
        log.info("model written to %s", folder)

    def resume(self) -> None:
        """Continue from the checkpoint of the context, if there is one."""
        if self.context.checkpoint is None:
            return
        self.step = load_checkpoint(self.context.checkpoint, self.stateful(), self.context.ranks)["step"]
        log.info("resuming after step %d from %s", self.step, self.context.checkpoint)

    def train_step(self) -> dict[str, float]:
        """Make all updates of a step, update the average, and return the metrics to log."""
        self._numbers = count()
        updates = self.updates()
        self.step += 1
        with self.clock.phase("optimizer"):
            self.ema.update(self.step)
        metrics = mean_metrics(updates)
        self._examine(updates[-1], metrics)
        return metrics | {"skipped": self.health.skipped}

    def _examine(self, last: Updated, metrics: dict[str, float]) -> None:
        if last.is_applied:
            self.health.step_done(self.step, metrics)
            return
        batch = last.micro_batches[0]
        prompts = self.data.read(batch.batch).prompts if self.is_main else []
        self.health.step_skipped(self.step, batch, prompts, metrics)

    def due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`, or the last one."""
        return self.step == self.config.trainer.steps or (every > 0 and self.step % every == 0)

    def report(self, metrics: dict[str, float], seconds: float, *, said: bool = False) -> None:
        """Write the metrics of this step, and a log line every ``trainer.log_every`` steps, or now if ``said``."""
        loop = self.config.trainer
        cost = {
            "seconds": seconds,
            **{f"seconds_{name}": spent for name, spent in self.clock.lap().items()},
            "memory_gib": peak_memory(self.device),
            "samples_per_second": self.plan.total / seconds,
        }
        self.context.tracker.log(self.step, metrics | cost)
        if said or self.due(loop.log_every):
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            left = duration((loop.steps - self.step) * seconds)
            log.info("step %d/%d  %s  %.2f s/step  %s left", self.step, loop.steps, values, seconds, left)

    def sample(self) -> None:
        """Write one video for each fixed prompt and a contact sheet. All processes share the work."""
        count, ranks = len(self.sample_prompts), self.context.ranks
        with self.ema.applied(), torch.no_grad():
            clips = make_together(self.sample_frames, count, ranks, batch=self.config.trainer.batch_size)
        if not self.is_main:
            return
        with self._going_on("samples"):
            self._write_samples(clips)

    def _write_samples(self, clips: list[Tensor]) -> None:
        video = self.config.video
        folder = self.context.logdir / "samples" / f"step_{self.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, clip in enumerate(clips):
            with VideoWriter(folder / f"{index:02d}.mp4", video.fps, scale=video.scale) as writer:
                writer.write(clip)
        save_contact_sheet(folder / "contact_sheet.png", clips, self.sample_prompts)
        self.context.tracker.video("sample", folder / "00.mp4", self.step)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Continue the training with a warning if a file cannot be written."""
        try:
            yield
        except OSError as error:
            log.warning(
                "%s of step %d could not be written: %s; training goes on",
                what,
                self.step,
                error.strerror or error,
            )

    def sample_embeds(self, text_encoder: PromptCache | StoredEmbeddings, indices: Sequence[int]) -> Tensor:
        """Return the embeddings [B L E] of ``sample_prompts``."""
        return text_encoder.encode([self.sample_prompts[index] for index in indices])

    def sample_noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Return the noise [B ...] of sample videos. An index always has the same noise."""
        drawn = [torch.randn(shape, generator=self.stream("samples", index)) for index in indices]
        return send(torch.stack(drawn), self.device)

    def sample_rollout(
        self,
        indices: Sequence[int],
        denoiser: Denoiser,
        prompt_embeds: Tensor,
        codec: VideoCodec,
        *,
        context: Tensor | None = None,
    ) -> Tensor:
        """Make few-step videos [B F 3 H W]. An index has the same noise at every call.

        Args:
            prompt_embeds: the embeddings of the prompts of these indices [B L E].
            context: given first latents [B f C H W]. They are part of the video.
        """
        shown = [] if context is None else [context]
        frames = self.config.video.num_frames - sum(part.shape[1] for part in shown)
        blocks = rollout(
            denoiser,
            self.sample_noise(indices, self.config.video.latent_shape(codec, frames)),
            prompt_embeds,
            KVCache(denoiser.transformer.config.num_layers),
            self.config.rollout,
            context_latents=context,
            generator=[self.stream("sample noise", index) for index in indices],
            images=self.config.rollout.context_images(codec),
        )
        return codec.decode(torch.cat([*shown, *(block.latents for block in blocks)], dim=1))

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint to resume from."""
        checkpoints.save(self.step, self.stateful(), {"config": to_dict(self.config)})

    def export_checkpoint(self, path: Path) -> None:
        """Write the state dicts of every trained module, and of its average as ``<name>_ema``: the official layout."""
        states = {name: full_state(module, keep=self.is_main) for name, module in self.trained.items()}
        states |= {f"{name}_ema": self.averaged(name) for name in self.averaged_names}
        for state in states.values():
            merge(state)
        if self.is_main:
            save_torch(path, {"step": self.step, "config": to_dict(self.config), **states})

    def averaged(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of a trained module with averaged parameters, on the main process. All must call it."""
        with self.ema.applied():
            return full_state(self.trained[name], keep=self.is_main)

    def export_transformer(self, folder: Path, name: str = "generator") -> None:
        """Write the averaged transformer called ``name``. If it was trained by LoRA, also write the LoRA for peft."""
        state = self.averaged(name)
        if not self.is_main:
            return
        lora = merge(state)
        dtype = getattr(torch, self.config.trainer.export_dtype)
        save_folder(folder / name, state, asdict(self.trained[name].config), dtype=dtype)
        if lora.layers:
            save_lora(folder / f"{name}_lora", lora)

    def _checkpoints(self) -> Checkpoints:
        loop = self.config.trainer
        keep = KeepPolicy(loop.keep_last, loop.keep_every)
        folder = self.context.logdir / CHECKPOINTS
        return Checkpoints(folder, keep, background=loop.save_in_background, ranks=self.context.ranks)
