"""Computes how much memory a video needs, before anything is loaded, and chooses how to save memory.

Letters: T tokens of a latent frame, D model width, GB are 10^9 bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import psutil
import torch
from torch import Tensor

from model.layer_cache import CacheDtype
from model.tiling import TileConfig
from model.transformer import WanConfig
from model.wan_autoencoder import WanVAEConfig
from model.weights import find_part, load_state_dict
from model.weights.transformer_read import open_transformer
from pipeline.config import CodecKind, PipelineConfig, Sampler
from pipeline.loading import waiting_dtype
from pipeline.sizes import codec_sizes, token_size
from utils.errors import UserError

GB = 10**9
VIDEO_BYTES_PER_PIXEL = 0.3
"""Bytes of an mp4 as this project writes it: blurred noise took 0.29, sharp noise 0.9; films take less."""
CUDA_OVERHEAD = GB // 2
"""The assumed memory for kernels, their workspaces and gaps between tensors. It is not measured."""
TAEHV = Path("checkpoints/taew2_1.pth")
"""The place of the small decoder after README's download command."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The files in which Linux gives the memory limit of a container (cgroup v2)."""


class TextPlacement(Enum):
    """The place of the text encoder. The value is its wording in a sentence."""

    resident = "resident"
    first = "run first and freed"
    streamed = "streamed"


@dataclass(frozen=True)
class Profile:
    """One choice of memory savings."""

    card: int
    """The smallest GPU memory, in GB, with which Wan2.1-T2V-1.3B makes its 81 frames of 480x832 in this profile."""
    text_encoder: TextPlacement = TextPlacement.resident
    """resident: always on the device; first: on the device before the other parts; streamed: one layer at a time."""
    tile_codec: bool = False
    """Decode in tiles."""
    decode_last: bool = False
    """Decode after the cache is freed."""
    stream_generator: bool = False
    """The generator's blocks are on the device one layer at a time."""

    def __str__(self) -> str:
        return self.describe()

    def describe(self, *, text: bool = True) -> str:
        """Describe the profile in words. ``text``: whether a prompt has to be embedded."""
        encoder = f"text encoder {self.text_encoder.value}" if text else "prompts from disk"
        codec = "tiled" if self.tile_codec else "whole"
        generator = "streamed" if self.stream_generator else "resident"
        last = ", decoding last" if self.decode_last else ""
        return f"{encoder}, VAE {codec}{last}, generator {generator}"

    def for_session(self) -> Profile:
        """Return the profile for prompts that come during a run: the encoder stays available, and chunks are shown."""
        text = self.text_encoder if self.text_encoder is TextPlacement.resident else TextPlacement.streamed
        return replace(self, text_encoder=text, decode_last=False)


PROFILES = (
    Profile(32),
    Profile(16, TextPlacement.first),
    Profile(16, TextPlacement.streamed),
    Profile(11, TextPlacement.streamed, tile_codec=True),
    Profile(10, TextPlacement.streamed, tile_codec=True, decode_last=True),
    Profile(8, TextPlacement.streamed, tile_codec=True, decode_last=True, stream_generator=True),
)
"""The profiles, from the one that uses the most memory to the least. The first that fits is taken."""


@dataclass(frozen=True)
class Weights:
    """The bytes of a part's weights, in the dtype in which they compute."""

    total: int
    layers: int
    """The bytes of the weights that can be streamed."""
    largest: int
    """The bytes of the largest layer among them."""
    waiting: int
    """The RAM that they take when streamed."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, streamed: str = "") -> Weights:
        """Return the sizes of a state dict. Weights whose names begin with ``streamed`` can be streamed."""
        layers: dict[str, int] = {}
        waiting = 0
        for name, tensor in state.items():
            if name.startswith(streamed):
                layer = name.rpartition(".")[0]
                layers[layer] = layers.get(layer, 0) + tensor.numel() * dtype.itemsize
                if waiting_dtype(device, dtype) not in (None, tensor.dtype):  # otherwise it stays in its file
                    waiting += tensor.numel() * dtype.itemsize
        total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
        return cls(total, sum(layers.values()), max(layers.values(), default=0), waiting)


@dataclass(frozen=True)
class Sizes:
    """The bytes that one video takes, by purpose."""

    text: Weights
    text_work: int
    generator: Weights
    codec: Weights
    cache: int
    """Keys and values."""
    work: int
    """Activations of one pass of the generator."""
    decoder: int
    """The state of the decoder between chunks, and its activations."""
    tiled_decoder: int
    """The same for one tile."""
    waiting_tiles: int
    """The state of the other tiles, in RAM."""
    whole_clips: bool
    """True if the whole clip is sampled before anything is decoded."""
    overhead: int
    """The bytes that the device takes in addition to tensors."""


@dataclass(frozen=True)
class Need:
    """The largest number of bytes at any moment."""

    device: int
    ram: int
    """RAM in addition to the device's memory. On a CPU there is only one memory, so it is 0."""


def need(profile: Profile, of: Sizes, *, one_memory: bool) -> Need:
    """Return the need of a video with a profile. ``one_memory``: the device computes in RAM."""
    streamed = profile.text_encoder is TextPlacement.streamed
    text = of.text.largest if streamed else of.text.total
    generator = of.generator.total
    if profile.stream_generator:
        generator += of.generator.largest - of.generator.layers
    decoding, denoising = of.tiled_decoder if profile.tile_codec else of.decoder, of.cache + of.work
    # A chunk is decoded while the next is denoised.
    both = max(denoising, decoding) if profile.decode_last or of.whole_clips else denoising + decoding
    video = generator + of.codec.total + both
    if profile.text_encoder is TextPlacement.resident:
        device = text + max(of.text_work, video)
    else:
        device = max(text + of.text_work, video)
    ram = max(
        of.text.waiting * streamed,
        of.generator.waiting * profile.stream_generator + of.waiting_tiles * profile.tile_codec,
    )
    return Need(int(device + of.overhead), 0 if one_memory else ram)


def measured_sizes(
    config: PipelineConfig, *, device: torch.device, dtype: torch.dtype, use_ema: bool | None, text: bool
) -> Sizes:
    """Return all sizes, from the headers of the weights and the configuration.

    Args:
        text: whether a prompt has to be embedded.
    """
    generator = config.generator
    model, state = open_transformer(generator.weights, preset=generator.preset, use_ema=use_ema)
    encoder = load_state_dict(find_part(config.text_encoder.weights, "text_encoder")) if text else {}
    codec = load_state_dict(find_part(config.codec.weights, "vae"))
    check_parts(config, model.config, encoder)
    return sizes(config, model.config, state, encoder, codec, device=device, dtype=dtype)


def sizes(
    config: PipelineConfig,
    transformer: WanConfig,
    generator: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    codec: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Sizes:
    """Compute all sizes from the configuration and the shapes of the weights. `encoder` is empty if not needed."""
    cache, work = generator_bytes(config, transformer, dtype)
    decoder, tiled_decoder, tiles = decoder_bytes(config, codec, device, dtype)
    return Sizes(
        text=Weights.of(encoder, device, dtype),
        text_work=text_work_bytes(encoder, transformer.text_len, dtype),
        generator=Weights.of(generator, device, dtype, streamed="blocks."),
        codec=Weights.of(codec, device, dtype),
        cache=cache,
        work=work,
        decoder=decoder,
        tiled_decoder=tiled_decoder,
        waiting_tiles=tiles,
        whole_clips=config.sampler is Sampler.many_step,
        overhead=CUDA_OVERHEAD if device.type == "cuda" else 0,
    )


def generator_bytes(config: PipelineConfig, transformer: WanConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the cache and of one pass's activations (feed-forward, or attention with rotation)."""
    rows, columns = token_size(config)
    tokens = (config.video.height // rows) * (config.video.width // columns)
    rollout, frames = config.rollout, config.video.num_frames
    guided = config.sampler is not Sampler.rollout and config.sampling.guidance_scale != 1
    batch, itemsize = 2 if guided else 1, dtype.itemsize
    whole = config.sampler is Sampler.many_step
    held = 0 if whole else min(frames, rollout.window or frames)
    token = transformer.dim * itemsize
    work = 0.0
    if rollout.cache_dtype is CacheDtype.fp8:  # keys and values of a layer are read as new tensors, through float32
        work += 2 * held * tokens * transformer.dim * (4 + itemsize)
        token = transformer.dim + 4 * transformer.num_heads
    cache = 2 * transformer.num_layers * (held * tokens * token + transformer.text_len * transformer.dim * itemsize)
    # Tensors of model width at once, as counted. Rotation is in float32, so it counts more in half precision.
    attention = 7.5 if itemsize == 4 else 10
    width = max(2 * transformer.ffn_dim + 4 * transformer.dim, attention * transformer.dim)
    work += (frames if whole else rollout.frames_per_chunk) * tokens * width * itemsize
    return int(batch * cache), int(batch * work)


def text_work_bytes(state: Mapping[str, Tensor], text_len: int, dtype: torch.dtype) -> int:
    """Return the bytes of the text encoder's activations for the longest prompt: scores, bias, inner layer."""
    ffn = next((shape[0] for shape in _shapes(state, "wi_0.weight")), 0)
    heads = next((shape[-1] for shape in _shapes(state, "relative_attention_bias.weight")), 0)
    return text_len * (3 * heads * text_len * 4 + 3 * ffn * dtype.itemsize)


def _shapes(state: Mapping[str, Tensor], suffix: str) -> list[torch.Size]:
    """Return the shapes of tensors with this suffix. Scalars occur only in damaged files, which the loader refuses."""
    return [tensor.shape for name, tensor in state.items() if name.endswith(suffix) and tensor.ndim]


def check_parts(config: PipelineConfig, transformer: WanConfig, encoder: Mapping[str, Tensor]) -> None:
    """Refuse parts that were not made for each other."""
    weights, channels = config.generator.weights, codec_sizes(config.codec).latent_channels
    if not transformer.in_dim == transformer.out_dim == channels:
        raise UserError(
            f"{weights}: takes latents of {transformer.in_dim} channels and gives {transformer.out_dim}, but "
            f"{config.codec.weights} has {channels}; they do not belong together"
        )
    for suffix in ("token_embedding.weight", "shared.weight"):
        for shape in _shapes(encoder, suffix):
            if shape[-1] != transformer.text_dim:
                raise UserError(
                    f"{weights}: takes prompt embeddings of {transformer.text_dim} numbers, but "
                    f"{config.text_encoder.weights} gives {shape[-1]}; they do not belong together"
                )


def decoder_bytes(
    config: PipelineConfig, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Return the bytes to decode a chunk whole, to decode it in tiles, and of the other tiles' state in RAM."""
    size, latents = (config.video.height, config.video.width), config.rollout.frames_per_chunk
    if config.codec.kind is CodecKind.tiny:
        whole = codec_sizes(config.codec).decode_bytes(*size, latents, dtype)
        return whole, whole, 0
    first = next((state[name] for name in ("encoder.conv1.weight", "encoder.conv_in.weight") if name in state), None)
    if first is None:
        raise UserError(f"{config.codec.weights}: is not a Wan2.1 VAE: it has no tensor 'encoder.conv1.weight'")
    vae, tiling = WanVAEConfig(base_dim=len(first)), TileConfig()
    whole, tiled = (
        vae.decode_bytes(*size, latents, dtype, device=device.type, tiling=tiles) for tiles in (None, tiling)
    )
    in_ram = {"latents": 1, "dtype": dtype, "device": "cpu"}
    one = vae.decode_bytes(*(min(side, tiling.tile) for side in size), **in_ram)
    return whole, tiled, vae.decode_bytes(*size, tiling=tiling, **in_ram) - one


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    profile: Profile
    line: str
    """The choice and its reason, in words."""


def plan(
    config: PipelineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    use_ema: bool | None = True,
    text: bool = True,
    interactive: bool = False,
    processes: int = 1,
) -> Plan:
    """Choose the first profile that fits.

    Args:
        text: whether a prompt has to be embedded.
        interactive: prompts come while it runs.
        processes: the number of processes that share this machine's RAM.

    Raises:
        UserError: no profile fits, or weights are missing or damaged.
    """
    measured = measured_sizes(config, device=device, dtype=dtype, use_ema=use_ema, text=text)
    return choose_profile(config, measured, device=device, text=text, interactive=interactive, processes=processes)


def choose_profile(
    config: PipelineConfig,
    measured: Sizes,
    *,
    device: torch.device,
    text: bool = True,
    interactive: bool = False,
    processes: int = 1,
) -> Plan:
    """Choose the first profile that fits into the free memory. Arguments and errors are those of :func:`plan`."""
    memory = "VRAM" if device.type == "cuda" else "RAM"
    ram = free_ram() // processes
    free = ram if memory == "RAM" else torch.cuda.mem_get_info(device)[0]
    allowed = free if config.vram is None else int(config.vram * GB)
    said = f"{_size(allowed)} of {memory} {'is free' if config.vram is None else 'is allowed (--vram)'}"
    profiles = [profile.for_session() for profile in PROFILES] if interactive else list(PROFILES)
    needs = [need(profile, measured, one_memory=memory == "RAM") for profile in profiles]
    for profile, needed in zip(profiles, needs, strict=True):
        if needed.device <= allowed and needed.ram <= ram:
            line = f"memory: {profile.describe(text=text)}: {_size(needed.device)} at most, {said}"
            if profile is not profiles[0]:
                line += f"; everything resident takes {_size(needs[0].device)}"
            return Plan(profile, line + _advice(config, profile))
    advice = _advice(config, profiles[-1])
    least = min(needs, key=lambda needed: needed.device)
    if least.device <= allowed:
        raise UserError(
            f"not enough RAM: {_size(least.ram)} is needed for the parts that wait there, and {_size(ram)} is free; "
            f"close other programs{advice}"
        )
    raise UserError(
        f"not enough {memory}: {_size(least.device)} is needed even with {profiles[-1]}, and {said}; "
        f"make rollout.window, video.height or video.width smaller, or allow more with --vram{advice}"
    )


def check_disk(config: PipelineConfig, videos: int) -> None:
    """Raise UserError if the disk of the output folder has no room for the files of ``videos`` videos."""
    video, folder = config.video, config.inference.output_folder
    frames = 1 + (video.num_frames - 1) * codec_sizes(config.codec).temporal_scale
    pixels = frames * video.height * video.width * video.scale**2
    needed, free = int(videos * pixels * VIDEO_BYTES_PER_PIXEL), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"not enough room in {folder}: {videos} videos take up to {_size(needed)}, and {_size(free)} is "
            "free; choose another --output_folder or fewer prompts"
        )


def free_ram() -> int:
    """Return the bytes that this process can still take, within the limits of the system and its container."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CONTROL_GROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    reclaimable = int(statistics.get("inactive_file", 0))
    return min(free, int(limit) - int(used) + reclaimable)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB else f"{num_bytes / GB * 1000:.1f} MB"


def _advice(config: PipelineConfig, profile: Profile) -> str:
    """Return the advice to use the smaller decoder if its file is there and it would help, else ""."""
    if config.codec.kind is CodecKind.tiny or not profile.tile_codec or not TAEHV.exists():
        return ""
    return f"; codec.kind=tiny codec.weights={TAEHV} needs less memory to decode"
