"""The loop every trainer shares: step, average, log, sample, save."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.weights import save_folder
from pipeline.rollout import rollout
from trainer.config import Config
from trainer.ema import EMA
from utils.config import save_config, to_dict
from utils.distributed import Ranks, derive_seed
from utils.errors import UserError
from utils.files import atomic_path
from utils.prompts import read_prompts
from utils.tracking import Tracker, progress
from utils.video import VideoWriter, save_contact_sheet

log = logging.getLogger(__name__)

SAMPLE_VIDEOS = 8


@dataclass
class RunContext:
    """Where and on what a run happens."""

    logdir: Path
    device: torch.device
    ranks: Ranks
    tracker: Tracker


class Trainer(ABC):
    """Trains the modules in :attr:`trained` and keeps their average.

    A subclass builds its parts in ``__init__``, calls :meth:`track`, and implements :meth:`train_step`,
    :meth:`sample_frames` and :meth:`export`.
    """

    trained: nn.ModuleDict
    ema: EMA

    def __init__(self, config: Config, context: RunContext) -> None:
        self.config = config
        self.context = context
        self.device = context.device
        self.step = 0
        self.generator = self.stream("data")
        self.sample_prompts = read_prompts(config.data.sample_prompts)[:SAMPLE_VIDEOS]
        save_config(config, context.logdir / "config.yaml")

    def stream(self, purpose: str) -> torch.Generator:
        """A random stream of its own for each purpose and rank."""
        seed = derive_seed(self.config.trainer.seed, purpose, self.context.ranks.rank)
        return torch.Generator().manual_seed(seed)

    def track(self, **modules: nn.Module) -> None:
        """Name the modules that train and start their average."""
        self.trained = nn.ModuleDict(modules)
        self.ema = EMA(self.trained, self.config.trainer.ema_decay, self.config.trainer.ema_start_step)

    def chunks_of(self, frames: int) -> list[tuple[int, int]]:
        """Frame ranges of a clip's chunks; UserError where the frames do not divide into them."""
        try:
            return self.config.rollout.chunks(frames)
        except ValueError as error:
            raise UserError(f"rollout: {error}") from None

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """One update; returns what to log."""

    @abstractmethod
    def sample_frames(self, prompts: list[str]) -> Tensor:
        """Sample videos with the averaged weights: [B F 3 H W] in [-1, 1]."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the averaged modules as folders that :mod:`pipeline.loading` reads."""

    def train(self) -> None:
        """Run the whole training."""
        loop = self.config.trainer
        bar = progress(loop.steps, self.config.objective.value, unit="step", is_main=self.context.ranks.is_main)
        with bar:
            while self.step < loop.steps:
                started = time.perf_counter()
                metrics = self.train_step()
                self.step += 1
                self.ema.update(self.step)
                self.report(metrics, time.perf_counter() - started)
                bar.update(1)
                if self.due(loop.sample_every):
                    self.sample()
                if self.due(loop.save_every):
                    self.save()
        self.export(self.context.logdir / "model")
        save_config(self.config, self.context.logdir / "model" / "config.yaml")
        log.info("model written to %s", self.context.logdir / "model")

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due."""
        return self.step == self.config.trainer.steps or (every > 0 and self.step % every == 0)

    def report(self, metrics: dict[str, float], seconds: float) -> None:
        """Write metrics of this step, and now and then a log line."""
        loop = self.config.trainer
        self.context.tracker.log(self.step, metrics | {"seconds": seconds})
        if self.due(loop.log_every):
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            left = (loop.steps - self.step) * seconds / 60
            log.info("step %d/%d  %s  %.2f s/step  %.0f min left", self.step, loop.steps, values, seconds, left)

    def sample(self) -> None:
        """Write one video a fixed prompt and a contact sheet of all."""
        with self.ema.applied(), torch.no_grad():
            clips = self.sample_frames(self.sample_prompts).float().cpu()
        video = self.config.video
        folder = self.context.logdir / "samples" / f"step_{self.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, clip in enumerate(clips):
            with VideoWriter(folder / f"{index:02d}.mp4", video.fps, scale=video.scale) as writer:
                writer.write(clip)
        save_contact_sheet(folder / "contact_sheet.png", list(clips), self.sample_prompts)
        self.context.tracker.video("sample", folder / "00.mp4", self.step)

    def sample_rollout(self, denoiser: Denoiser, prompt_embeds: Tensor, codec: VideoCodec) -> Tensor:
        """Few-step videos [B F 3 H W] of prompts [B L E], from the same noise at every call."""
        shape = (len(prompt_embeds), *self.config.video.latent_shape(codec))
        blocks = rollout(
            denoiser,
            torch.randn(shape, generator=self.stream("samples")).to(self.device),
            prompt_embeds,
            KVCache(denoiser.transformer.config.num_layers),
            self.config.rollout,
            generator=self.stream("sample noise"),
        )
        return codec.decode(torch.cat([block.latents for block in blocks], dim=1))

    def save(self) -> None:
        """Write a checkpoint in the official layout, whole or not at all."""
        content = {"step": self.step, "config": to_dict(self.config), **self.checkpoint()}
        with atomic_path(self.context.logdir / f"checkpoint_{self.step:06d}.pt") as path:
            torch.save(content, path)

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by name: every trained module, and its average under ``<name>_ema``."""
        states = {name: module.state_dict() for name, module in self.trained.items()}
        return states | {f"{name}_ema": self.averaged(name) for name in self.trained}

    def averaged(self, name: str) -> dict[str, Tensor]:
        """State dict of a trained module with averaged parameters."""
        with self.ema.applied():
            return self.trained[name].state_dict()

    def export_transformer(self, folder: Path, name: str = "generator") -> None:
        """Write the averaged transformer called ``name``."""
        dtype = getattr(torch, self.config.trainer.export_dtype)
        save_folder(folder / name, self.averaged(name), asdict(self.trained[name].config), dtype=dtype)
