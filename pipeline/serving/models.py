"""The model of a configuration as the server wants it: loaded with progress, its choices, sessions and commands."""

from __future__ import annotations

import importlib.util
import io
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.serving.clips import Cue
from pipeline.serving.messages import DEFAULT_STYLE, FULL_PRECISION, LONGEST_PROMPT, MOST_FPS, MOST_SEED, Start
from pipeline.serving.spec import StreamSpec
from pipeline.steps import most_steps
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from model.codec import VideoCodec
    from model.denoiser import Denoiser
    from pipeline.config import PipelineConfig
    from pipeline.session import LatentChunk, StreamSession
    from pipeline.text_to_video import TextToVideo

log = logging.getLogger(__name__)

MOST_STEPS = 8
MOST_EXAMPLES = 12
SMALLEST_HALF = 240  # side in pixels below which half a size is not offered
STYLES = {  # of a prompt switch, with what each does
    "recache": "keeps the scene, read anew with the new prompt",
    "blend": "passes to the new prompt over a few chunks",
    "keep": "keeps the scene as it was seen",
    "cut": "starts a new scene",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as the command line said it: what a clip's command repeats."""

    read_config: Callable[[], PipelineConfig]
    """Reads the configuration; called on the loading thread, as it imports torch."""
    arguments: list[str]
    """Arguments by which inference.py loads the same model: --config_path and so on."""
    use_ema: bool = False
    """Averaged weights, where a checkpoint holds both."""
    tiny_decoder: Path | None = None
    """TAEHV weights to offer beside the configured Wan VAE."""


class Models:
    """Loads the parts once; streams share them. Another precision of the denoiser is loaded when first asked for."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._config: PipelineConfig
        self._base: TextToVideo
        self._device: torch.device
        self._dtype: torch.dtype
        self._codecs: dict[str, VideoCodec] = {}
        self._special: tuple[str, bool, Denoiser] | None = None  # the last precision asked for beside the model's own
        self._examples: list[str] = []

    def load(self, report: Callable[[str, float], None]) -> None:
        """Import, load and warm up. Raises UserError for what is missing or damaged."""
        report("importing torch", 0.1)
        import torch  # noqa: F401, reported by itself as it takes seconds

        report("reading the configuration", 0.3)
        from utils.distributed import resolve_device, resolve_dtype, share_cores
        from utils.prompts import read_prompts

        config = self._source.read_config()
        # Visitors type freely: what they type should not fill the disk.
        self._config = config = replace(config, text_encoder=replace(config.text_encoder, cache=None))
        self._examples = read_prompts(config.inference.data_path)[:MOST_EXAMPLES]
        report("importing the model", 0.4)
        from pipeline import memory
        from pipeline.text_to_video import load_pipeline

        self._device = device = resolve_device(config.device)
        self._dtype = dtype = resolve_dtype(config.dtype, device)
        share_cores(device)  # between denoising and decoding
        parts = {"device": device, "dtype": dtype, "use_ema": config.generator.average(self._source.use_ema)}
        chosen = memory.plan(config, interactive=True, **parts)
        log.info(chosen.line)
        report("loading the weights", 0.6)
        self._base = load_pipeline(config, profile=chosen.profile, **parts)
        self._load_codecs()
        report("warming up", 0.9)
        for decoder in self._codecs:
            self._warm_up(self._default_spec(decoder))

    def options(self) -> dict[str, Any]:
        """See docs/api.md."""
        config = self._config
        steps = most_steps(config.rollout.denoising_steps)
        parameters = sum(p.numel() for p in self._base.denoiser.transformer.parameters())
        return {
            "model": f"{config.generator.preset}, {parameters / 1e6:,.1f} M parameters, {self._device}",
            "examples": self._examples,
            "sizes": self._sizes(),
            "fps": config.video.fps,
            "steps": steps,
            "most_steps": max(steps, MOST_STEPS),
            "num_frames": config.video.num_frames,
            "frames_per_chunk": config.rollout.frames_per_chunk,
            "temporal_scale": self._base.codec.temporal_scale,
            "decoders": list(self._codecs),
            "precisions": offered_precisions(self._device),
            "compile": self._device.type == "cuda",  # where it pays
            "styles": STYLES,
            "longest_prompt": LONGEST_PROMPT,
            "most_fps": MOST_FPS,
            "most_seed": MOST_SEED,
        }

    def spec(self, message: Start, image: bytes | None) -> StreamSpec:
        """A checked request. Raises UserError for what is not on offer."""
        config = self._config
        size = (message.height or config.video.height, message.width or config.video.width)
        check_offered("height, width", size, self._sizes())
        check_offered("decoder", message.decoder or next(iter(self._codecs)), list(self._codecs))
        check_offered("precision", message.precision, offered_precisions(self._device))
        check_offered("compile", message.compile, [False, True] if self._device.type == "cuda" else [False])
        if message.num_frames is not None:
            given = int(image is not None)
            try:
                config.rollout.chunks(message.num_frames - given, given)
            except ValueError as error:
                raise UserError(f"num_frames={message.num_frames}: {error}") from error
        steps = message.steps if message.steps != most_steps(config.rollout.denoising_steps) else None
        if steps is not None and steps > MOST_STEPS:
            raise UserError(f"steps={steps} is more than {MOST_STEPS}")
        spec = self._default_spec(message.decoder or next(iter(self._codecs)))
        return replace(
            spec,
            prompt=message.prompt,
            height=size[0],
            width=size[1],
            fps=message.fps or spec.fps,
            seed=message.seed,
            num_frames=message.num_frames,
            steps=steps,
            precision=message.precision,
            compiled=message.compile,
            image=image,
        )

    def is_prepared(self, spec: StreamSpec) -> bool:
        """Whether the denoiser that a stream needs is in memory."""
        wanted, special = (spec.precision, spec.compiled), self._special
        return wanted == (FULL_PRECISION, False) or (special is not None and special[:2] == wanted)

    def prepare(self, spec: StreamSpec) -> None:
        """Load what a stream needs and is not there yet; streams that run go on meanwhile, with what they have."""
        with self._lock:
            if self.is_prepared(spec):
                return
            self._special = (spec.precision, spec.compiled, self._load_special(spec))
        self._warm_up(replace(spec, image=None))

    def open(self, spec: StreamSpec) -> StreamSession:
        """Begin a stream."""
        from pipeline.session import StreamRequest, StreamSession
        from utils.video import load_image

        image = None if spec.image is None else load_image(io.BytesIO(spec.image), spec.height, spec.width)[None]
        request = StreamRequest(
            prompt=spec.prompt,
            height=spec.height,
            width=spec.width,
            seed=spec.seed,
            num_frames=spec.num_frames,
            denoising_steps=step_list(spec.steps),
            context_frames=image,
        )
        return StreamSession(self._pipeline(spec), request)

    def denoise_batch(self, sessions: list[StreamSession]) -> list[LatentChunk | None]:
        """The next chunks of several sessions, made as a batch."""
        from pipeline import session

        return session.denoise_together(sessions)

    def command(self, spec: StreamSpec, cues: Sequence[Cue], latents: int, clip: Path) -> list[str]:
        """Arguments of the command that makes the first latent frames of a stream again; see ``clips.Gallery``."""
        video = self._config.video
        source = f"--prompt={spec.prompt}" if spec.image is None else f"--data_path={clip.with_suffix('.jsonl')}"
        command = ["python", "inference.py", *self._source.arguments, source]
        command += ["--i2v"] if spec.image is not None else []
        command += [f"--seed={spec.seed}", f"--num_output_frames={latents}", f"--fps={spec.fps}"]
        command += [f"--output_folder=videos/{clip.stem.rpartition('-')[2]}"]
        command += switch_arguments(cues, clip.with_suffix(".yaml"))
        if (spec.height, spec.width) != (video.height, video.width):
            command += [f"video.height={spec.height}", f"video.width={spec.width}"]
        if spec.steps is not None:
            command.append(f"rollout.denoising_steps={step_list(spec.steps)}")
        if self._codecs and spec.decoder != next(iter(self._codecs)):
            command += ["codec.kind=tiny", f"codec.weights={self._source.tiny_decoder}"]
        if spec.precision != FULL_PRECISION:
            command.append(f"optimize.quantize={spec.precision}")
        return [*command, *(["optimize.compile=default"] if spec.compiled else [])]

    def _sizes(self) -> list[tuple[int, int]]:
        """Heights and widths on offer: the model's own, turned, square, and half as large where that is not tiny."""
        from pipeline.sizes import token_size

        rows, columns = token_size(self._config)
        height, width = self._config.video.height, self._config.video.width
        side = round((height * width) ** 0.5)
        wanted = [(height, width), (width, height), (side, side)]
        if min(height, width) >= 2 * SMALLEST_HALF:
            wanted += [(height // 2, width // 2), (width // 2, height // 2)]
        return list(dict.fromkeys((h // rows * rows, w // columns * columns) for h, w in wanted))

    def _default_spec(self, decoder: str) -> StreamSpec:
        video = self._config.video
        return StreamSpec(self._examples[0], video.height, video.width, video.fps, decoder=decoder, scale=video.scale)

    def _load_codecs(self) -> None:
        from pipeline.config import CodecConfig, CodecKind
        from pipeline.loading import load_codec

        self._codecs = {"Wan VAE" if self._config.codec.kind is CodecKind.wan else "TinyVAE": self._base.codec}
        if self._source.tiny_decoder is not None:
            tiny = CodecConfig(CodecKind.tiny, str(self._source.tiny_decoder))
            self._codecs["TAEHV"] = load_codec(tiny, device=self._device, dtype=self._dtype)

    def _load_special(self, spec: StreamSpec) -> Denoiser:
        from pipeline.loading import load_denoiser
        from pipeline.optimize import CompileMode, Quantization, optimize

        place = {"device": self._device, "dtype": self._dtype}
        generator = self._config.generator
        denoiser = load_denoiser(generator, use_ema=generator.average(self._source.use_ema), **place)
        wanted = self._config.optimize
        if spec.precision != FULL_PRECISION:
            wanted = replace(wanted, quantize=Quantization[spec.precision])
        if spec.compiled:
            wanted = replace(wanted, compile=CompileMode.default)
        optimize(denoiser.eval().transformer, wanted)
        return denoiser

    def _pipeline(self, spec: StreamSpec) -> TextToVideo:
        base, special = self._base, self._special
        denoiser = base.denoiser
        if special is not None and special[:2] == (spec.precision, spec.compiled):
            denoiser = special[2]
        elif (spec.precision, spec.compiled) != (FULL_PRECISION, False):
            raise UserError("another precision was asked for meanwhile: start again")
        return replace(base, denoiser=denoiser, codec=self._codecs[spec.decoder])

    def _warm_up(self, spec: StreamSpec) -> None:
        """One chunk, so that no viewer waits for what happens once."""
        session = self.open(spec)
        session.decode(session.denoise())
        session.stop()


def offered_precisions(device: torch.device) -> list[str]:
    """The model's own, and those that make a difference on a device and that torchao is there for."""
    if device.type != "cuda" or importlib.util.find_spec("torchao") is None:
        return [FULL_PRECISION]
    import torch

    from pipeline.optimize import FP8_CAPABILITY

    fp8 = ["fp8"] if torch.cuda.get_device_capability(device) >= FP8_CAPABILITY else []
    return [FULL_PRECISION, "int8", *fp8]


def switch_arguments(cues: Sequence[Cue], storyboard: Path) -> list[str]:
    """The inference.py arguments of the same switches: one each if all have one style, else a storyboard."""
    styles = {cue.style for cue in cues}
    if len(styles) > 1:
        return [f"--storyboard={storyboard}"]
    switches = [f"--switch={cue.at:.3f}s: {cue.prompt}" for cue in cues]
    return [*switches, *(f"--switch_style={style}" for style in styles - {DEFAULT_STYLE})]


def check_offered(name: str, value: Any, offered: Sequence[Any]) -> None:
    """Raise UserError for a value that is not on offer."""
    if value not in offered:
        raise UserError(f"{name}={value} is not on offer; choose from {', '.join(map(str, offered))}")


def step_list(steps: int | None) -> list[float] | None:
    """Evenly spaced timesteps from 1000 down; None stays None."""
    return None if steps is None else [float(round(1000 * (steps - i) / steps)) for i in range(steps)]
