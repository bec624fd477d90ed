"""The loop every trainer shares: accumulate, clip, step, average, log, sample, save."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

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
from trainer.config import Config, Objective
from trainer.data import Stream
from trainer.ema import EMA
from trainer.health import Health
from trainer.lora import LoRAConfig, add_lora, merge
from trainer.micro_batch import MicroBatch, plan_batches
from trainer.optimizer import Optimizer, OptimizerConfig
from trainer.parallelize import Parallelism, average_replicated, full_state, synchronise_gradients
from trainer.samples import make_together
from trainer.stored_data import StoredEmbeddings
from utils.checkpoint import Checkpoints, KeepPolicy, Stateful, load_checkpoint, read_about
from utils.checkpoint_search import find_good_checkpoint, put_away
from utils.config import save_config, to_dict
from utils.distributed import (
    Ranks,
    all_reduce_mean,
    any_process,
    broadcast_value,
    derive_seed,
    stop_signals,
)
from utils.errors import UserError
from utils.prompts import read_prompts
from utils.tracking import Stopwatch, Tracker, peak_memory, progress
from utils.transfer import send
from utils.video import VideoWriter, save_contact_sheet

log = logging.getLogger(__name__)

SAMPLE_VIDEOS = 8
CHECKPOINTS = "checkpoints"
MADE_BY_RUNS = ("model", "model.pt", "samples")
"""What a run that starts anew keeps under another name, besides checkpoints and metrics."""


@dataclass
class RunContext:
    """Where and on what a run happens."""

    logdir: Path
    device: torch.device
    ranks: Ranks
    tracker: Tracker
    checkpoint: Path | None = None
    """To resume from."""


def find_checkpoint(logdir: Path, objective: Objective, ranks: Ranks, *, anew: bool) -> tuple[Path | None, int]:
    """The verified checkpoint that a run in ``logdir`` goes on from, and its step. All processes call it.

    A run that starts anew, because ``anew`` asks for it or there is no checkpoint, renames what an earlier run left.

    Raises:
        UserError: no checkpoint is good, or they are of another objective.
    """
    folder = logdir / CHECKPOINTS
    path = None if anew else find_good_checkpoint(folder, ranks)
    if path is None:
        if ranks.is_main:
            for name in (CHECKPOINTS, *MADE_BY_RUNS) if anew else MADE_BY_RUNS:
                put_away(logdir / name)
        broadcast_value(None)  # nobody makes anything there before
        return None, 0
    about = read_about(path)
    if (other := about.get("config", {}).get("objective")) != objective.value:
        raise UserError(
            f"{path}: does not fit this run: objective (checkpoint: {other}, run: {objective.value}); use the "
            "configuration it was made with, another --logdir, or --no_resume, which keeps the earlier run under "
            "other names"
        )
    return path, about["step"]


class Loss(NamedTuple):
    """What one micro-batch gives an update."""

    total: Tensor
    """Scalar, a mean over the samples, with gradient."""
    metrics: dict[str, Tensor]
    """Detached scalars to log, averaged as the loss is."""


@dataclass(frozen=True)
class Update:
    """One step of one optimizer: the mean loss of its micro-batches, over all processes."""

    optimizer: Optimizer
    loss: Callable[[MicroBatch], Loss]
    micro_batches: list[MicroBatch]
    """Of this process."""
    prefix: str = ""
    """Before the names of the gradient norm and the learning rate."""


@dataclass
class Averages:
    """Means of what was logged under each name, in the order of first appearance."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metrics: dict[str, float]) -> None:
        """Log values."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Name -> mean."""
        return {name: sum(values) / len(values) for name, values in self.values.items()}


class Trainer(ABC):
    """Trains modules, keeps the average of some, and leaves them to inference.

    A subclass builds its parts and :attr:`data` in ``__init__``, names them with :meth:`track`, :meth:`keep` and
    :meth:`optimize`, and implements :meth:`updates`, :meth:`sample_frames` and :meth:`export`. It gives losses: how
    they are accumulated, divided over processes, clipped, skipped, applied and saved is said here alone.
    """

    data: Stream
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
        if self.is_main:
            save_config(config, context.logdir / "config.yaml")

    def seed(self, *parts: int | str) -> int:
        """A seed for each purpose, the same on every process."""
        return derive_seed(self.config.trainer.seed, *parts)

    def stream(self, *parts: int | str) -> torch.Generator:
        """A random stream for each purpose, the same on every process."""
        return torch.Generator().manual_seed(self.seed(*parts))

    def load_trained(self, config: DenoiserConfig, lora: LoRAConfig | None = None) -> Denoiser:
        """A denoiser to be trained, in float32, spread over the processes; ``lora`` stands in for the run's own."""
        device, lora = self.parallelism.loading_device, lora or self.config.lora
        denoiser = load_denoiser(config, device=device, generator=self.stream("weights"))
        if lora.rank:
            add_lora(denoiser.transformer, lora, self.stream("lora"))
        return self.parallelism.trained(denoiser)

    def load_frozen(self, config: DenoiserConfig) -> Denoiser:
        """A denoiser that is not trained, in the precision it computes in, spread over the processes."""
        options = {"device": self.parallelism.loading_device, "dtype": self.parallelism.dtype}
        return self.parallelism.frozen(load_denoiser(config, **options))

    def track(self, **modules: nn.Module) -> None:
        """Name the modules that the run is about: they are saved, and their average is kept."""
        self.keep(**modules)
        self.averaged_names = list(modules)
        loop = self.config.trainer
        self.ema = EMA(nn.ModuleDict(modules), loop.ema_decay, loop.ema_start_step)
        self.ema.warn_if_young(loop.steps)

    def keep(self, **modules: nn.Module) -> None:
        """Name modules that train along: they are saved."""
        self.trained |= modules

    def optimize(self, name: str, module: nn.Module, config: OptimizerConfig, steps: int) -> Optimizer:
        """Make the optimizer of a module, saved as ``name``."""
        self.optimizers[name] = Optimizer(module, config, steps)
        return self.optimizers[name]

    def stateful(self) -> dict[str, Stateful]:
        """Everything a resumed run needs besides the step, by name. Random streams are functions of the step."""
        return {
            **{f"model.{name}": module for name, module in self.trained.items()},
            **{f"optimizer.{name}": optimizer for name, optimizer in self.optimizers.items()},
            "ema": self.ema,
            "data": self.data,
            "health": self.health,
        }

    def micro_batches(self, batch: range | None = None) -> list[MicroBatch]:
        """What this process computes in the next update; its random streams are new ones, and so, by default, its data.

        Args:
            batch: data indices of a global batch seen before.
        """
        seed = self.seed("update", self.step, next(self._numbers))
        return self.plan.divide(self.data.draw(self.plan.total) if batch is None else batch, seed)

    def chunks_of(self, frames: int) -> list[tuple[int, int]]:
        """Frame ranges of a clip's chunks; UserError where the frames do not divide into them."""
        try:
            return self.config.rollout.chunks(frames)
        except ValueError as error:
            raise UserError(f"rollout: {error}") from None

    @abstractmethod
    def updates(self) -> Iterator[Update]:
        """The updates of one step, in order. After a skipped one the generator is closed: the rest of the step falls
        out, so what follows a ``yield`` happens only if that update was applied."""

    @abstractmethod
    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        """Sample videos of ``sample_prompts`` with the weights as they are: [B F 3 H W] in [-1, 1].

        A video depends on its index alone, not on the others; see :meth:`sample_noise`.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the averaged modules as folders that :mod:`pipeline.loading` reads."""

    def train(self) -> None:
        """Run the whole training, or what is left of it.

        A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) to any process ends it early: the step is finished and saved.
        """
        loop = self.config.trainer
        checkpoints = self._checkpoints()
        with stop_signals() as stop, self._bar() as bar:
            self.resume()
            bar.update(self.step)
            while self.step < loop.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                self.report(metrics, time.perf_counter() - started)
                bar.update(1)
                if any_process(stop.received is not None) and self.step < loop.steps:
                    self.save(checkpoints)
                    checkpoints.finish()
                    log.info("asked to stop after step %d; the same command goes on from there", self.step)
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
        """Leave the trained models to others.

        Raises:
            UserError: they cannot be written.
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
        """Go on from the checkpoint of the context, if there is one."""
        if self.context.checkpoint is None:
            return
        self.step = load_checkpoint(self.context.checkpoint, self.stateful(), self.context.ranks)["step"]
        log.info("resuming after step %d from %s", self.step, self.context.checkpoint)

    def train_step(self) -> dict[str, float]:
        """All updates of a step, then the average; returns what to log. A failed update ends the step early."""
        self._numbers = count()
        averages = Averages()
        failed: Update | None = None
        for update in self.updates():
            metrics = self.accumulate(update)
            averages.add(metrics)
            if not self.apply(update, averages, finite=all(map(math.isfinite, metrics.values()))):
                failed = update
                break
        self.step += 1
        with self.clock.phase("optimizer"):
            self.ema.update(self.step)
        self._examine(failed, averages.means())
        return averages.means() | {"skipped": self.health.skipped}

    def _examine(self, failed: Update | None, metrics: dict[str, float]) -> None:
        if failed is None:
            self.health.step_done(self.step, metrics)
            return
        batch = failed.micro_batches[0]
        prompts = self.data.read(batch.batch).prompts if self.is_main else []
        self.health.step_skipped(self.step, batch, prompts, metrics)

    def accumulate(self, update: Update) -> dict[str, float]:
        """Gradients of the mean loss over all micro-batches of all processes; returns the means of what they log."""
        sums: dict[str, Tensor] = {}
        share = 1 / len(update.micro_batches)
        for micro_batch in update.micro_batches:
            last = micro_batch is update.micro_batches[-1]
            synchronise_gradients(update.optimizer.module, last or self.config.parallel.reduce_every_pass)
            loss = update.loss(micro_batch)
            with self.clock.phase("backward"):
                (share * loss.total).backward()
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0) + share * value.float()
        average_replicated(update.optimizer.named.values())
        means = all_reduce_mean(torch.stack(list(sums.values())))
        return dict(zip(sums, means.tolist(), strict=True))

    def apply(self, update: Update, averages: Averages, *, finite: bool) -> bool:
        """Clip and step once, unless something is not finite; whether the update was applied."""
        with self.clock.phase("optimizer"):
            lr = update.optimizer.lr
            norm = update.optimizer.step(skip=not finite)
        averages.add({f"{update.prefix}gradient_norm": norm, f"{update.prefix}lr": lr})
        return finite and math.isfinite(norm)

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due."""
        return self.step == self.config.trainer.steps or (every > 0 and self.step % every == 0)

    def report(self, metrics: dict[str, float], seconds: float) -> None:
        """Write metrics of this step, and now and then a log line."""
        loop = self.config.trainer
        cost = {
            "seconds": seconds,
            **{f"seconds_{name}": spent for name, spent in self.clock.lap().items()},
            "memory_gib": peak_memory(self.device),
            "samples_per_second": self.plan.total / seconds,
        }
        self.context.tracker.log(self.step, metrics | cost)
        if self.due(loop.log_every):
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            left = (loop.steps - self.step) * seconds / 60
            log.info("step %d/%d  %s  %.2f s/step  %.0f min left", self.step, loop.steps, values, seconds, left)

    def sample(self) -> None:
        """Write one video a fixed prompt and a contact sheet of all. All processes share the work."""
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
        """A file that cannot be written is no reason to end a training."""
        try:
            yield
        except OSError as error:
            log.warning("%s of step %d not written: %s; training goes on", what, self.step, error.strerror or error)

    def sample_embeds(self, text_encoder: PromptCache | StoredEmbeddings, indices: Sequence[int]) -> Tensor:
        """Embeddings [B L E] of ``sample_prompts``."""
        return text_encoder.encode([self.sample_prompts[index] for index in indices])

    def sample_noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Noise [B ...] of sample videos; that of an index is always the same."""
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
        """Few-step videos [B F 3 H W], from the same noise for an index at every call.

        Args:
            prompt_embeds: of the prompts of these indices [B L E].
            context: given first latents [B f C H W], which are shown too.
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
        """State dict of a trained module with averaged parameters, on the main process; all must call it."""
        with self.ema.applied():
            return full_state(self.trained[name], keep=self.is_main)

    def export_transformer(self, folder: Path, name: str = "generator") -> None:
        """Write the averaged transformer called ``name``, and what a LoRA changed of it as a folder for peft."""
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
