"""The models as the server uses them: their choices, their sessions, and the commands of clips.

One model is in memory at a time. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.serving.clips import Cue
from pipeline.serving.live import MOST_FRAME_BYTES
from pipeline.serving.messages import (
    DEFAULT_STYLE,
    FULL_PRECISION,
    LONGEST_PROMPT,
    MOST_BLEND_CHUNKS,
    MOST_FPS,
    MOST_SEED,
    Start,
)
from pipeline.serving.spec import ModelSource, StreamSpec, short_names
from pipeline.steps import even_steps, most_steps
from utils.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.loaded import LoadedModel
    from pipeline.session import StreamSession
    from pipeline.stream import LatentChunk

MOST_STEPS = 8
SMALLEST_HALF = 240  # pixels; half a size is offered only if its shorter side has at least this many
STYLES = {  # style of a prompt switch -> its text on the page
    "recache": "keeps the scene and reads it again with the new prompt",
    "blend": "keeps the scene and changes to the new prompt over a few chunks",
    "keep": "keeps the scene unchanged; only new chunks follow the new prompt",
    "cut": "forgets the scene and starts a new one",
}


class Models:
    """The choices that a model offers, and the commands that repeat its clips. :meth:`load` loads the model itself.

    Args:
        sources: the models among which visitors may choose. The first one is the default.

    Raises:
        UserError: two sources have the same configuration.
    """

    def __init__(self, *sources: ModelSource) -> None:
        names = short_names([source.config_path for source in sources])
        self._sources = dict(zip(names, sources, strict=True))
        self._source, self._chosen = sources[0], names[0]
        self._loaded: LoadedModel | None = None

    @property
    def names(self) -> list[str]:
        """The names of the models, the default first."""
        return list(self._sources)

    @property
    def chosen(self) -> str:
        """The name of the model that is loaded or will be."""
        return self._chosen

    def check(self, name: str) -> None:
        """Raise UserError if the configuration of a model has a mistake or its files are missing."""
        loaded_module().check_source(self._sources[name])

    def choose(self, name: str) -> None:
        """Drop the loaded model. :meth:`load` then loads the one of this name."""
        self._loaded = None
        self._source, self._chosen = self._sources[name], name

    def load(self, report: Callable[[str, float], None]) -> None:
        """Import, load and warm up the model. Raises UserError if a file is missing or damaged."""
        report("importing torch", 0.1)
        self._loaded = loaded_module().LoadedModel(self._source, report)

    def download(self, report: Callable[[str, float], None]) -> None:
        """Download the published weights of the chosen model that are missing. Raises UserError."""
        loaded_module().download_source(self._source, report)

    def options(self) -> dict[str, Any]:
        """Return the choices of a stream, as docs/api.md lists them."""
        config = self._loaded.config
        steps = most_steps(config.rollout.denoising_steps)
        loaded = self._loaded
        return {
            "model": f"{config.generator.preset}, {loaded.parameters / 1e6:,.1f} M parameters, {loaded.device}",
            "examples": loaded.examples,
            "sizes": self._sizes(),
            "fps": config.video.fps,
            "steps": steps,
            "most_steps": max(steps, MOST_STEPS),
            "num_frames": config.video.num_frames,
            "frames_per_chunk": config.rollout.frames_per_chunk,
            "temporal_scale": loaded.base.codec.temporal_scale,
            "decoders": loaded.decoders,
            "precisions": loaded.precisions,
            "compile": loaded.device.type == "cuda",  # on a CPU it gains nothing
            "styles": STYLES,
            "longest_prompt": LONGEST_PROMPT,
            "most_fps": MOST_FPS,
            "most_seed": MOST_SEED,
            "most_blend_chunks": MOST_BLEND_CHUNKS,
            "source_bytes": MOST_FRAME_BYTES,
        }

    def spec(self, message: Start, image: bytes | None) -> StreamSpec:
        """Return the checked request. Raises UserError for a choice that the model does not offer."""
        loaded, config = self._loaded, self._loaded.config
        size = (message.height or config.video.height, message.width or config.video.width)
        check_offered("height, width", size, self._sizes())
        decoder = message.decoder or loaded.decoders[0]
        check_offered("decoder", decoder, loaded.decoders)
        check_offered("precision", message.precision, loaded.precisions)
        check_offered("compile", message.compile, [False, True] if loaded.device.type == "cuda" else [False])
        if message.num_frames is not None:
            given = int(image is not None)
            try:
                config.rollout.chunks(message.num_frames - given, given)
            except ValueError as error:
                raise UserError(f"num_frames={message.num_frames}: {error}") from error
        steps = message.steps if message.steps != most_steps(config.rollout.denoising_steps) else None
        if steps is not None and steps > MOST_STEPS:
            raise UserError(f"steps={steps} is more than {MOST_STEPS}")
        spec = loaded.default_spec(decoder)
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
            strength=message.strength,
            record=message.record,
        )

    def is_prepared(self, spec: StreamSpec) -> bool:
        """Return whether the denoiser that a stream needs is in memory."""
        return self._loaded.is_prepared(spec)

    def prepare(self, spec: StreamSpec) -> None:
        """Load the denoiser that a stream needs, if it is not there yet. Running streams keep theirs and go on."""
        self._loaded.prepare(spec)

    def open(self, spec: StreamSpec) -> StreamSession:
        """Open the session of a stream."""
        return self._loaded.open(spec)

    def denoise_batch(self, sessions: list[StreamSession]) -> list[LatentChunk | None]:
        """Make the next chunks of several sessions as one batch."""
        return self._loaded.denoise_batch(sessions)

    def command(self, spec: StreamSpec, cues: Sequence[Cue], latents: int, clip: Path) -> list[str]:
        """Return the arguments of the command that makes a clip again; see ``clips.Gallery``."""
        video = self._loaded.config.video
        source = f"--prompt={spec.prompt}" if spec.image is None else f"--data_path={clip.with_suffix('.jsonl')}"
        command = ["python", "inference.py", *self._source.arguments, source]
        command += ["--i2v"] if spec.image is not None else []
        command += [f"--seed={spec.seed}", f"--num_output_frames={latents}", f"--fps={spec.fps}"]
        command += [f"--output_folder=videos/{clip.stem.rpartition('-')[2]}"]
        command += switch_arguments(cues, clip.with_suffix(".yaml"))
        if (spec.height, spec.width) != (video.height, video.width):
            command += [f"video.height={spec.height}", f"video.width={spec.width}"]
        if spec.steps is not None:
            command.append(f"rollout.denoising_steps={even_steps(spec.steps)}")
        if spec.decoder != self._loaded.decoders[0]:
            command += ["codec.kind=tiny", f"codec.weights={self._source.tiny_decoder}"]
        if spec.precision != FULL_PRECISION:
            command.append(f"optimize.quantize={spec.precision}")
        return [*command, *(["optimize.compile=default"] if spec.compiled else [])]

    def _sizes(self) -> list[tuple[int, int]]:
        """Return the offered sizes: the model's own, portrait, square, and the halves of these if they are not tiny."""
        rows, columns = self._loaded.token_size
        height, width = self._loaded.config.video.height, self._loaded.config.video.width
        side = round((height * width) ** 0.5)
        wanted = [(height, width), (width, height), (side, side)]
        if min(height, width) >= 2 * SMALLEST_HALF:
            wanted += [(height // 2, width // 2), (width // 2, height // 2)]
        return list(dict.fromkeys((h // rows * rows, w // columns * columns) for h, w in wanted))


def loaded_module() -> ModuleType:
    """Return ``pipeline.serving.loaded``. It imports torch, which takes seconds."""
    from pipeline.serving import loaded

    return loaded


def switch_arguments(cues: Sequence[Cue], storyboard: Path) -> list[str]:
    """Return the arguments of inference.py for the same switches. If their styles differ, a storyboard is needed."""
    styles = {cue.style for cue in cues}
    if len(styles) > 1 or any(cue.settings for cue in cues):
        return [f"--storyboard={storyboard}"]
    switches = [f"--switch={cue.at:.3f}s: {cue.prompt}" for cue in cues]
    return [*switches, *(f"--switch_style={style}" for style in styles - {DEFAULT_STYLE})]


def check_offered(name: str, value: Any, offered: Sequence[Any]) -> None:
    """Raise UserError if a value is not among the offered ones."""
    if value not in offered:
        raise UserError(f"{name}={value} is not possible; choose from {', '.join(map(str, offered))}")
