"""The pipeline with the interface of diffusers: ``from_pretrained``, a call that returns ``.frames``, LoRA, offloading.

Shapes: B videos, F pixel frames, H W pixel size, f C h w latent frames, channels and size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from model.weights.card import write_card
from model.weights.diffusers_folder import INDEX_FILE, read_shift, write_index
from model.weights.transformer_read import open_transformer
from model.weights.transformer_write import write_transformer
from pipeline.config import CodecKind, PipelineConfig, Sampler, load_pipeline_config
from pipeline.hub import ask_hub
from pipeline.loading import load_codec, load_text_encoder
from pipeline.memory import PROFILES, TextPlacement
from pipeline.request import StreamRequest
from pipeline.rollout import Stage
from pipeline.session import Chunk, StreamSession
from pipeline.stream import LatentChunk, Stream
from pipeline.text_to_video import TextToVideo, load_pipeline
from utils.checkout import find_shipped
from utils.config import from_dict, to_dict
from utils.distributed import resolve_device, resolve_dtype
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.frames import fit_image
from utils.images import load_image

PIPELINE_FILE = "pipeline.yaml"
ABOUT = "A causal video diffusion model: it turns a prompt into a video, chunk by chunk, in a few denoising steps."
USAGE = """\
```python
from pipeline import SelfForcingPipeline  # in a checkout of the code that trained it

pipeline = SelfForcingPipeline.from_pretrained("FOLDER")
frames = pipeline("PROMPT").frames
```
"""
WEIGHTS = (("generator", "weights"), ("codec", "weights"), ("text_encoder", "weights"), ("text_encoder", "tokenizer"))
OUTPUT_TYPES = ("np", "pil", "pt", "latent")
SEEDS = 2**62
OFFLOADED = replace(PROFILES[0], text_encoder=TextPlacement.streamed, tile_codec=True)


@dataclass
class VideoOutput:
    """The result of a call."""

    frames: Any
    """``np``: array [B F H W 3] in [0, 1]; ``pil``: a list of images for each video; ``pt``: tensor [B F 3 H W] in
    [0, 1]; ``latent``: tensor [B f C h w]."""


class SelfForcingPipeline:
    """Turns prompts into videos, with the interface of a diffusers pipeline.

    The parts are loaded at the first call and kept. ``num_frames`` counts pixel frames, as in diffusers.
    """

    def __init__(self, config: PipelineConfig, *, use_ema: bool = True) -> None:
        """Nothing is loaded yet. ``use_ema`` takes the averaged weights if a checkpoint holds both."""
        self.config = config
        self._use_ema = use_ema
        self._offload = False
        self._parts: TextToVideo | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str = "auto",
        use_ema: bool = True,
        overrides: Sequence[str] = (),
        **download: Any,
    ) -> SelfForcingPipeline:
        """Make a pipeline from a folder or from the Hugging Face hub.

        Args:
            name_or_path: a folder with ``pipeline.yaml`` (as :meth:`save_pretrained` writes it, or
                ``checkpoints/shapes``), a diffusers folder of Wan2.1 with ``model_index.json``, a YAML file of
                ``configs``, or a name on the hub such as ``user/model``. A diffusers folder does not say how its
                weights were trained: it is sampled as Wan itself, in many steps. For a few-step causal model add
                ``sampler=rollout`` to ``overrides``.
            torch_dtype: None takes bfloat16 on CUDA and float32 elsewhere.
            overrides: keys of the configuration, such as ``rollout.window=9``.
            download: options of :func:`huggingface_hub.snapshot_download`, such as ``revision``.

        Raises:
            UserError: none of these exists, or a value does not fit.
        """
        path = Path(find_shipped(str(name_or_path)))
        if not path.exists():
            path = _download(str(name_or_path), download)
        config = load_pipeline_config(path, overrides) if path.is_file() else _folder_config(path, overrides)
        dtype = config.dtype if torch_dtype is None else str(torch_dtype).removeprefix("torch.")
        return cls(replace(config, device=device, dtype=dtype), use_ema=use_ema)

    @property
    def parts(self) -> TextToVideo:
        """The loaded parts. The first use loads them."""
        if self._parts is None:
            device = resolve_device(self.config.device)
            options: dict[str, Any] = {"device": device, "dtype": resolve_dtype(self.config.dtype, device)}
            if self._offload:
                options["profile"] = OFFLOADED
            self._parts = load_pipeline(self.config, use_ema=self._use_ema, **options)
        return self._parts

    @property
    def transformer(self) -> torch.nn.Module:
        """The causal transformer."""
        return self.parts.denoiser.transformer

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SelfForcingPipeline:
        """Use another device or dtype from the next call on."""
        if device is not None:
            self.config.device = str(device)
        if dtype is not None:
            self.config.dtype = str(dtype).removeprefix("torch.")
        self._parts = None
        return self

    def load_lora_weights(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Merge a LoRA file or folder, in any published key layout, into the transformer from the next call on."""
        self.config.generator = replace(self.config.generator, lora=str(path), lora_scale=scale)
        self._parts = None

    def unload_lora_weights(self) -> None:
        """Go back to the transformer without a LoRA."""
        self.config.generator = replace(self.config.generator, lora=None)
        self._parts = None

    def enable_model_cpu_offload(self) -> None:
        """Keep the layers of the text encoder in RAM until they compute, and decode in tiles."""
        self._offload, self._parts = True, None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``pipeline.yaml`` and the folders ``transformer``, ``codec`` or ``vae``, and ``text_encoder``.

        ``transformer`` has the layout of diffusers. :meth:`from_pretrained` reads the folder back. With the Wan VAE it
        is a whole diffusers folder too, with ``model_index.json``, ``scheduler`` and ``tokenizer``.
        """
        folder, config = Path(folder), self.config
        model, state = open_transformer(config.generator.weights, preset=config.generator.preset, use_ema=self._use_ema)
        write_transformer(folder, state, model.config, format="diffusers")
        write_card(
            folder,
            model.config,
            parameters=sum(tensor.numel() for tensor in state.values()),
            source=config.generator.weights,
            about=ABOUT,
            usage=USAGE,
        )
        codec = "codec" if config.codec.kind is CodecKind.tiny else "vae"
        autoencoder = load_codec(config.codec)
        (autoencoder if codec == "codec" else autoencoder.vae).save_pretrained(folder / codec)
        text_encoder = load_text_encoder(config.text_encoder)
        text_encoder.save_pretrained(folder / "text_encoder")
        if config.codec.kind is CodecKind.wan:
            text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
            write_index(folder, tokenizer=type(text_encoder.tokenizer).__name__, shift=config.generator.shift)
        values = _differences(to_dict(config), to_dict(PipelineConfig()))
        values.setdefault("generator", {})["weights"] = "transformer"
        values.setdefault("codec", {})["weights"] = codec
        values.setdefault("text_encoder", {}).update(weights="text_encoder", tokenizer=None)
        for key in ("inference", "device", "dtype", "vram"):
            values.pop(key, None)
        atomic_write_text(folder / PIPELINE_FILE, yaml.safe_dump(values, allow_unicode=True, sort_keys=False))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: str | Path | Image.Image | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[SelfForcingPipeline, int, float, dict[str, Tensor]], Any] | None = None,
    ) -> VideoOutput:
        """Make one video for each prompt.

        Args:
            prompt: one or several.
            image: the first frame of every video.
            height, width: pixels; None takes the configuration's.
            num_frames: pixel frames, ``1 + 4 (n - 1)`` for n latent frames; None takes the configuration's.
            generator: it seeds the videos; None takes seed 0.
            output_type: np, pil, pt or latent; see :class:`VideoOutput`.
            callback_on_step_end: called after each denoising pass with the pipeline, the number of the pass, its
                timestep and ``{"latents": x0 [B f C h w]}``.

        Raises:
            ValueError: an unknown output type, or sizes and lengths that do not fit.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        options = self._options(image, height, width, num_frames)
        seed = 0 if generator is None else int(torch.randint(SEEDS, (1,), generator=generator, device=generator.device))
        requests = [StreamRequest(text, seed=seed, sample=index, **options) for index, text in enumerate(prompts)]
        stream = Stream(self.parts, *requests)
        chunks = list(_drive(stream, self, callback_on_step_end))
        if output_type == "latent":
            return VideoOutput(torch.cat([chunk.latents for chunk in chunks], dim=1))
        return VideoOutput(_convert([stream.decode(chunk).float().cpu() for chunk in chunks], output_type))

    def stream(
        self,
        prompt: str,
        *,
        image: str | Path | Image.Image | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int = 0,
    ) -> Iterator[Chunk]:
        """Yield frames chunk by chunk, as soon as they are made.

        Without ``num_frames`` the video never ends. Leaving the loop ends it.

        Yields:
            chunks whose ``frames`` are uint8 [F H W 3] on the CPU.
        """
        options = self._options(image, height, width, num_frames, endless=num_frames is None)
        yield from StreamSession(self.parts, StreamRequest(prompt, seed=seed, **options))

    def _options(
        self,
        image: str | Path | Image.Image | None,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        *,
        endless: bool = False,
    ) -> dict[str, Any]:
        video, codec = self.config.video, self.parts.codec
        height, width = height or video.height, width or video.width
        length = video.num_frames + (image is not None) if num_frames is None else codec.num_latents(num_frames)
        context = None if image is None else _first_frame(image, height, width)[None]
        frames = None if endless else length
        return {"height": height, "width": width, "num_frames": frames, "context_frames": context}


def _first_frame(image: str | Path | Image.Image, height: int, width: int) -> Tensor:
    """Return an image file or a PIL image as [3 H W] in [-1, 1]."""
    if isinstance(image, Image.Image):
        return fit_image(image.convert("RGB"), height, width)
    return load_image(image, height, width)


def _folder_config(folder: Path, overrides: Sequence[str]) -> PipelineConfig:
    """Return the configuration of a folder, with absolute paths."""
    if (folder / PIPELINE_FILE).is_file():
        config = load_pipeline_config(folder / PIPELINE_FILE, overrides, inputs=())  # its paths are the folder's
        for section, key in WEIGHTS:
            value = getattr(getattr(config, section), key)
            if value is not None:
                setattr(getattr(config, section), key, str(folder / value))
        return config
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{folder}: holds neither {PIPELINE_FILE} nor {INDEX_FILE}; name a folder of a whole pipeline")
    shift = read_shift(folder)
    values = {
        "sampler": Sampler.many_step.name,
        "generator": {"weights": str(folder)} | ({} if shift is None else {"shift": shift}),
        "codec": {"weights": str(folder / "vae")},
        "text_encoder": {"weights": str(folder / "text_encoder"), "tokenizer": str(folder / "tokenizer")},
    }
    return from_dict(PipelineConfig, values, str(folder / INDEX_FILE), overrides)


def _differences(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults of the schema, section by section."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults[key], dict):
            value = _differences(value, defaults[key])
            if value:
                found[key] = value
        elif value != defaults[key]:
            found[key] = value
    return found


def _download(name: str, options: dict[str, Any]) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such folder or file here, and not a name on the hub such as user/model")
    here = "check the path: there is no such folder here"
    return Path(ask_hub(name, lambda: snapshot_download(name, **options), otherwise=here))


def _drive(stream: Stream, pipeline: SelfForcingPipeline, callback: Callable[..., Any] | None) -> Iterator[LatentChunk]:
    """Yield the chunks of a stream. The callback is called after each denoising pass."""
    count = 0
    while not stream.ended:
        pending = stream.pending
        x0 = None if pending is None else stream.compute()
        chunk = stream.advance(x0)
        if callback is not None and pending is not None and pending.stage is Stage.denoise:
            callback(pipeline, count, pending.timestep, {"latents": x0})
            count += 1
        if chunk is not None:
            yield chunk


def _convert(parts: list[Tensor], output_type: str) -> Any:
    """Convert frames [B F 3 H W] in [-1, 1] to an output type of diffusers."""
    frames = (torch.cat(parts, dim=1) / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return frames
    arrays = frames.movedim(2, -1).numpy()
    if output_type == "np":
        return arrays
    return [[Image.fromarray(frame) for frame in np.rint(255 * video).astype(np.uint8)] for video in arrays]
