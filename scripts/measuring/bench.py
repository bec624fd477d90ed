"""The bench that every measurement uses: the parts to measure, a clock, and a store of times.

Shapes: B batch, L text tokens, E text channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.transformer import WanConfig
from model.wan_autoencoder import WanAutoencoder
from model.wan_vae import WanVAE
from pipeline.config import PipelineConfig
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.optimize import optimize
from scripts.measuring.random_codec import random_codec
from utils.distributed import resolve_dtype

Figures = dict[str, float]
"""Name with unit -> value."""
PROMPT = "a large red circle moving right on a navy background"


@dataclass
class Bench:
    """The parts of a configuration, and how they are measured."""

    config: PipelineConfig
    device: torch.device
    config_path: str = ""
    """The configuration file and its overrides, for measurements that start other programs."""
    overrides: tuple[str, ...] = ()
    repeats: int = 5
    """Number of videos, passes or steps that are measured."""
    frames: int | None = None
    """Latent frames of a video. None: as in the configuration."""
    random_weights: bool = False
    """Whether parts have random weights, so that no files are needed."""
    cpu_clock: bool = False
    """Whether processor time is measured instead of wall-clock time."""
    threads: int | None = None
    """The number of CPU threads on the command line, if any."""
    spans: dict[str, list[float]] = field(default_factory=dict)
    """Stage -> its measured seconds."""

    def now(self) -> float:
        """Wait until all queued work is done. Return the time of the clock in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.cpu_clock else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds that one call takes."""
        start = self.now()
        work()
        return self.now() - start

    def in_turn(self, *works: Callable[[], object]) -> list[float]:
        """Call all functions in turn for several rounds, the first one to warm up. Return the least seconds of each."""
        times = [[self.seconds(work) for work in works] for _ in range(self.repeats + 1)]
        return [min(column) for column in zip(*times[1:], strict=True)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the seconds of a block under a name."""
        start = self.now()
        yield
        self.spans.setdefault(name, []).append(self.now() - start)

    def stages(self) -> Figures:
        """Return the median and the 90th percentile of every stage in milliseconds, and clear the store."""
        figures: Figures = {}
        for name, spans in self.spans.items():
            for percent in (50, 90):
                figures[f"{name} p{percent} ms"] = 1e3 * torch.tensor(spans).quantile(percent / 100).item()
        self.spans.clear()
        return figures

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the parts compute."""
        return resolve_dtype(self.config.dtype, self.device)

    @property
    def num_frames(self) -> int:
        """Latent frames of a video."""
        return self.frames or self.config.video.num_frames

    def denoiser(self) -> Denoiser:
        """Return the generator, optimised as configured."""
        section = self.config.generator
        if self.random_weights:
            section = replace(section, weights=None, lora=None)
        denoiser = load_denoiser(section, use_ema=True, device=self.device, dtype=self.dtype)
        optimize(denoiser.transformer, self.config.optimize)
        return denoiser.eval()

    def codec(self) -> VideoCodec:
        """Return the video codec."""
        if not self.random_weights:
            return load_codec(self.config.codec, device=self.device, dtype=self.dtype)
        codec = random_codec(self.config)
        if isinstance(codec, WanAutoencoder):
            codec = WanVAE(codec)
        return codec.to(self.device, self.dtype).eval().requires_grad_(False)

    def text(self, sizes: WanConfig) -> Callable[[], Tensor]:
        """Return a function that embeds a prompt [1 L E]. It computes the embedding in every call."""
        if self.random_weights:
            embeds = torch.randn(1, sizes.text_len, sizes.text_dim).to(self.device, self.dtype)
            embeds[:, sizes.text_len // 4 :] = 0
            return embeds.clone
        encoder = load_text_encoder(self.config.text_encoder, device=self.device, dtype=self.dtype)
        return lambda: encoder.encode([PROMPT])
