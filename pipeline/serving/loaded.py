"""The loaded model of the demo: its parts, one more precision of its denoiser, and the sessions that use them.

``models.py`` imports this module on the loading thread. Importing torch takes seconds, and the page is there before.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.weights.published import not_found, published
from pipeline import memory
from pipeline.config import CodecConfig, CodecKind, PipelineConfig, load_pipeline_config
from pipeline.download import GB, download_weights, missing_weights, plan_download
from pipeline.loading import load_codec, load_denoiser
from pipeline.optimize import FP8_CAPABILITY, CompileMode, Quantization, optimize
from pipeline.request import StreamRequest
from pipeline.serving.live_source import LiveSource
from pipeline.serving.messages import FULL_PRECISION
from pipeline.serving.missing import MissingFile, MissingWeights
from pipeline.serving.spec import ModelSource, StreamSpec
from pipeline.session import StreamSession, denoise_together
from pipeline.sizes import token_size
from pipeline.steps import even_steps
from pipeline.stream import LatentChunk
from pipeline.text_to_video import TextToVideo, load_pipeline
from utils.distributed import resolve_device, resolve_dtype, share_cores
from utils.errors import UserError
from utils.frames import to_float
from utils.images import load_image
from utils.prompts import read_prompts

log = logging.getLogger(__name__)

MOST_EXAMPLES = 12


class LoadedModel:
    """The parts of a model. All streams share them."""

    def __init__(self, source: ModelSource, report: Callable[[str, float], None]) -> None:
        """Load and warm up the model. `report` gets the stage as text and the finished share in [0, 1].

        Raises:
            UserError: a file is missing or damaged.
        """
        report("reading the configuration", 0.4)
        gc.collect()  # an earlier model may be part of a circle of references
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        config = load_pipeline_config(source.config_path, source.overrides)
        if source.download:
            download_weights(config, report)
        elif source.offer_download:
            offer_missing(config)
        # The prompts of visitors are not stored, because they could fill the disk.
        self.config = config = replace(config, text_encoder=replace(config.text_encoder, cache=None))
        self.examples = read_prompts(config.inference.data_path)[:MOST_EXAMPLES]
        self.device = resolve_device(config.device)
        self._dtype = resolve_dtype(config.dtype, self.device)
        self._average = config.generator.average(source.use_ema)
        self._lock = threading.Lock()
        self._special: tuple[str, bool, Denoiser] | None = None  # the latest precision besides the model's own
        share_cores(self.device)  # between denoising and decoding
        parts = {"device": self.device, "dtype": self._dtype, "use_ema": self._average}
        chosen = memory.plan(config, interactive=True, **parts)
        log.info(chosen.line)
        report("loading the weights", 0.6)
        self.base = load_pipeline(config, profile=chosen.profile, **parts)
        self._codecs = self._load_codecs(source)
        report("warming up", 0.9)
        for decoder in self._codecs:
            self._warm_up(self.default_spec(decoder))

    @property
    def parameters(self) -> int:
        """The number of parameters of the transformer."""
        return sum(parameter.numel() for parameter in self.base.denoiser.transformer.parameters())

    @property
    def decoders(self) -> list[str]:
        """The names of the video decoders, the configured one first."""
        return list(self._codecs)

    @property
    def precisions(self) -> list[str]:
        """The precisions that the model offers."""
        return offered_precisions(self.device)

    @property
    def token_size(self) -> tuple[int, int]:
        """The pixel rows and columns of a token."""
        return token_size(self.config)

    def default_spec(self, decoder: str) -> StreamSpec:
        """Return a request with the configuration's own values and an example prompt."""
        video = self.config.video
        return StreamSpec(self.examples[0], video.height, video.width, video.fps, decoder=decoder, scale=video.scale)

    def is_prepared(self, spec: StreamSpec) -> bool:
        """Return whether the denoiser that a stream needs is in memory."""
        wanted, special = (spec.precision, spec.compiled), self._special
        return wanted == (FULL_PRECISION, False) or (special is not None and special[:2] == wanted)

    def prepare(self, spec: StreamSpec) -> None:
        """Load the denoiser that a stream needs, if it is not there yet. Streams that run keep what they have."""
        with self._lock:
            if self.is_prepared(spec):
                return
            self._special = (spec.precision, spec.compiled, self._load_special(spec))
        self._warm_up(replace(spec, image=None))

    def open(self, spec: StreamSpec) -> StreamSession:
        """Open the session of a stream."""
        image = None if spec.image is None else load_image(io.BytesIO(spec.image), spec.height, spec.width)[None]
        request = StreamRequest(
            prompt=spec.prompt,
            height=spec.height,
            width=spec.width,
            seed=spec.seed,
            num_frames=spec.num_frames,
            denoising_steps=None if spec.steps is None else even_steps(spec.steps),
            context_frames=image,
            source=None if spec.source is None else source_frames(spec.source),
            strength=spec.strength,
        )
        return StreamSession(self._pipeline(spec), request)

    def denoise_batch(self, sessions: list[StreamSession]) -> list[LatentChunk | None]:
        """Make the next chunks of several sessions as a batch."""
        return denoise_together(sessions)

    def _load_codecs(self, source: ModelSource) -> dict[str, VideoCodec]:
        codecs = {"Wan VAE" if self.config.codec.kind is CodecKind.wan else "TinyVAE": self.base.codec}
        if source.tiny_decoder is not None:
            tiny = CodecConfig(CodecKind.tiny, str(source.tiny_decoder))
            codecs["TAEHV"] = load_codec(tiny, device=self.device, dtype=self._dtype)
        return codecs

    def _load_special(self, spec: StreamSpec) -> Denoiser:
        generator = self.config.generator
        denoiser = load_denoiser(generator, use_ema=self._average, device=self.device, dtype=self._dtype)
        wanted = self.config.optimize
        if spec.precision != FULL_PRECISION:
            wanted = replace(wanted, quantize=Quantization[spec.precision])
        if spec.compiled:
            wanted = replace(wanted, compile=CompileMode.default)
        optimize(denoiser.eval().transformer, wanted)
        return denoiser

    def _pipeline(self, spec: StreamSpec) -> TextToVideo:
        base, special = self.base, self._special
        denoiser = base.denoiser
        if special is not None and special[:2] == (spec.precision, spec.compiled):
            denoiser = special[2]
        elif (spec.precision, spec.compiled) != (FULL_PRECISION, False):
            raise UserError("another visitor has changed the precision in the meantime; start again")
        return replace(base, denoiser=denoiser, codec=self._codecs[spec.decoder])

    def _warm_up(self, spec: StreamSpec) -> None:
        """Make one chunk, so that no viewer waits for work that happens only once."""
        session = self.open(spec)
        session.decode(session.denoise())
        session.stop()


def check_source(source: ModelSource) -> PipelineConfig:
    """Return the configuration of a model, without loading the model.

    Raises:
        UserError: the configuration has a mistake, its prompts cannot be read, or its weights are missing and are not
            downloaded first.
    """
    config = load_pipeline_config(source.config_path, source.overrides)
    read_prompts(config.inference.data_path)
    may_come = source.download or source.offer_download
    for path in missing_weights(config):
        if not Path(path).exists() and not (may_come and published(path)):
            raise UserError(f"{source.config_path}: {not_found(path)}")
    return config


def download_source(source: ModelSource, report: Callable[[str, float], None]) -> None:
    """Download the weights of a model that are missing. Raises UserError."""
    download_weights(load_pipeline_config(source.config_path, source.overrides), report)


def offer_missing(config: PipelineConfig) -> None:
    """Do nothing if all weights are here.

    Raises:
        MissingWeights: some are missing and published.
        UserError: some are missing and not published.
    """
    paths = missing_weights(config)
    unknown = next((path for path in paths if published(path) is None), None)
    if unknown is not None:
        raise not_found(unknown)
    if not paths:
        return
    try:
        fetches = plan_download(config)
    except UserError as error:  # such as no network; a person may try again
        if all(Path(path).exists() for path in paths):  # the rest may have come in another way
            return
        raise MissingWeights(f"Weights of this model are missing: {', '.join(paths)}. {error}") from error
    files = [MissingFile(str(f.source.into / file.name), file.size - file.bytes_here(f.source.into))
             for f in fetches for file in f.files]  # fmt: skip
    if files:
        size = sum(file.bytes for file in files) / GB
        names = ", ".join(sorted({fetch.source.repository for fetch in fetches}))
        message = f"Weights of this model are missing: {len(files)} files, {size:.2f} GB, published as {names}."
        raise MissingWeights(message, files)


def offered_precisions(device: torch.device) -> list[str]:
    """Return the model's own precision, and on CUDA with torchao the 8-bit ones that the device supports."""
    if device.type != "cuda" or importlib.util.find_spec("torchao") is None:
        return [FULL_PRECISION]
    fp8 = ["fp8"] if torch.cuda.get_device_capability(device) >= FP8_CAPABILITY else []
    return [FULL_PRECISION, "int8", *fp8]


def source_frames(source: LiveSource) -> Iterator[Tensor | None]:
    """Yield the frames of a live source [1 3 H W] in [-1, 1], and None while none waits."""
    for pixels in source:
        if pixels is None:
            yield None
            continue
        frame = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, source.height, source.width, 3)
        yield to_float(frame)
