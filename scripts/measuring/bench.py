"""What every measurement needs: the parts to measure, a clock, and where times are kept.

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
from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig
from model.transformer import WanConfig
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE
from pipeline.config import CodecKind, PipelineConfig
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.optimize import optimize
from utils.distributed import resolve_dtype

Figures = dict[str, float]
"""Name with unit -> value."""
PROMPT = "a large red circle moving right on a navy background"


@dataclass
class Bench:
    """The parts of a configuration and how to measure them."""

    config: PipelineConfig
    device: torch.device
    config_path: str = ""
    """File of the configuration, and what overrides it: for measurements that start other programs."""
    overrides: tuple[str, ...] = ()
    repeats: int = 5
    """Videos, passes or steps that are measured."""
    frames: int | None = None
    """Latent frames of a video; None takes the configuration's."""
    random_weights: bool = False
    """Full-size parts without files, and random text embeddings."""
    cpu_clock: bool = False
    """Count processor time, not the time of the wall's clock."""
    threads: int | None = None
    """CPU threads that were asked for."""
    spans: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each stage."""

    def now(self) -> float:
        """Seconds, after everything that is queued is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.cpu_clock else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        start = self.now()
        work()
        return self.now() - start

    def in_turn(self, *works: Callable[[], object]) -> list[float]:
        """Seconds of each work, the least of several rounds over all of them; the first round only warms up."""
        times = [[self.seconds(work) for work in works] for _ in range(self.repeats + 1)]
        return [min(column) for column in zip(*times[1:], strict=True)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keep how long something takes under a name."""
        start = self.now()
        yield
        self.spans.setdefault(name, []).append(self.now() - start)

    def stages(self) -> Figures:
        """Median and 90th percentile of every stage in milliseconds; forgets them."""
        figures: Figures = {}
        for name, spans in self.spans.items():
            for percent in (50, 90):
                figures[f"{name} p{percent} ms"] = 1e3 * torch.tensor(spans).quantile(percent / 100).item()
        self.spans.clear()
        return figures

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the parts compute in."""
        return resolve_dtype(self.config.dtype, self.device)

    @property
    def num_frames(self) -> int:
        """Latent frames of a video."""
        return self.frames or self.config.video.num_frames

    def denoiser(self) -> Denoiser:
        """The generator, optimised as configured."""
        section = self.config.generator
        if self.random_weights:
            section = replace(section, weights=None, lora=None)
        denoiser = load_denoiser(section, use_ema=True, device=self.device, dtype=self.dtype)
        optimize(denoiser.transformer, self.config.optimize)
        return denoiser.eval()

    def codec(self) -> VideoCodec:
        """The video codec."""
        if not self.random_weights:
            return load_codec(self.config.codec, device=self.device, dtype=self.dtype)
        if self.config.codec.kind is CodecKind.wan:
            codec = WanVAE(WanAutoencoder(WanVAEConfig()))
        else:
            codec = TinyVAE(TinyVAEConfig())
        return codec.to(self.device, self.dtype).eval().requires_grad_(False)

    def text(self, sizes: WanConfig) -> Callable[[], Tensor]:
        """A function that embeds a prompt [1 L E], every time anew."""
        if self.random_weights:
            embeds = torch.randn(1, sizes.text_len, sizes.text_dim).to(self.device, self.dtype)
            embeds[:, sizes.text_len // 4 :] = 0
            return embeds.clone
        encoder = load_text_encoder(self.config.text_encoder, device=self.device, dtype=self.dtype)
        return lambda: encoder.encode([PROMPT])
