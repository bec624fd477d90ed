"""TinyVAE: the TAEHV architecture (github.com/madebyollin/taehv) at any width.

A video autoencoder of plain 2-D convolutions in which only `MemBlock` looks back, by exactly one frame. All frames of a
chunk therefore run as one batch, and a stream needs no state but the last frame each `MemBlock` has seen. Frames and
weights lie in memory with channels last, which convolutions are fastest with.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size, t time.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.weights import CONFIG_FILE, StateDict, layer_numbers, load_into, load_state_dict, save_folder
from utils.errors import UserError
from utils.side_files import check_schema, read_json

Memory = dict[int, Tensor]
"""Layer index -> the last frame [B 1 h w c] that layer has seen; empty before a stream begins."""


MAX_SIZE, MAX_STAGES, MAX_BLOCKS = 2**14, 8, 64  # a config.json may come from anybody


@dataclass
class TinyVAEConfig:
    """Sizes of a TinyVAE; the defaults are the published TAEHV for Wan2.1 latents. Stages count from the pixels on."""

    patch_size: int = 1
    """Side of the pixel squares folded into channels before the encoder."""
    latent_channels: int = 16
    """Channels of a latent."""
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    """Width before the first encoder stage, then of each stage."""
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    """Width of each decoder stage, then after the last one."""
    encoder_blocks: int = 3
    """MemBlocks in each encoder stage; 0 leaves the encoder linear apart from its first ReLU."""
    decoder_blocks: int = 3
    """MemBlocks in each decoder stage."""
    spatial_strides: tuple[int, ...] = (2, 2, 2)
    """Spatial reduction of each encoder stage; the decoder undoes them in reverse."""
    temporal_strides: tuple[int, ...] = (2, 2, 1)
    """Temporal reduction of each encoder stage; the decoder undoes them in reverse."""
    latent_limit: float = 3.0
    """The decoder bends latents softly into (-latent_limit, latent_limit)."""
    first_frame_alone: bool = False
    """True: copies of the first frame precede the clip, so latent 0 codes frame 0 alone, as in the Wan VAE.
    False: the published way, in which the last frame is repeated to fill the last latent."""

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths", "spatial_strides", "temporal_strides"):
            setattr(self, name, tuple(getattr(self, name)))
        stages = len(self.spatial_strides)
        if len(self.temporal_strides) != stages:
            raise ValueError(f"{self.temporal_strides=} and {self.spatial_strides=} differ in their number of stages")
        for name in ("encoder_widths", "decoder_widths"):
            if len(getattr(self, name)) != stages + 1:
                raise ValueError(f"{name}={getattr(self, name)} needs {stages + 1} entries for {stages} stages")
        sizes = (self.patch_size, self.latent_channels, *self.encoder_widths, *self.decoder_widths)
        if min(*sizes, *self.spatial_strides, *self.temporal_strides) < 1:
            raise ValueError(f"sizes and strides must be positive: {self}")
        if max(*sizes, *self.spatial_strides, *self.temporal_strides) > MAX_SIZE or stages > MAX_STAGES:
            raise ValueError(f"sizes above {MAX_SIZE} or more than {MAX_STAGES} stages: {self}")
        if max(self.encoder_blocks, self.decoder_blocks) > MAX_BLOCKS:
            raise ValueError(f"{self.encoder_blocks=} and {self.decoder_blocks=} must be at most {MAX_BLOCKS}")
        if not 0 < self.latent_limit < math.inf:
            raise ValueError(f"{self.latent_limit=} must be positive")
        if min(self.encoder_blocks, self.decoder_blocks) < 0:
            raise ValueError(f"{self.encoder_blocks=} and {self.decoder_blocks=} must not be negative")

    @property
    def spatial_scale(self) -> int:
        """Pixels along a latent's side."""
        return self.patch_size * math.prod(self.spatial_strides)

    @property
    def temporal_scale(self) -> int:
        """Frames of a latent after the first."""
        return math.prod(self.temporal_strides)

    def decode_bytes(self, height: int, width: int, latents: int, dtype: torch.dtype) -> int:
        """Estimate of what decoding chunks of so many latents to frames of H x W takes beside the weights."""
        area = height * width // self.spatial_scale**2
        kept = peak = 0
        strides = zip(reversed(self.spatial_strides), reversed(self.temporal_strides), strict=True)
        for index, (scale, stride) in enumerate(strides):
            inner, outer = self.decoder_widths[index : index + 2]
            if self.decoder_blocks:
                kept += self.decoder_blocks * inner * area
                peak = max(peak, 6 * inner * area * latents)  # a MemBlock's input, past, both joined, and two results
            grown = stride * inner * area * latents
            area, latents = area * scale**2, latents * stride
            peak = max(peak, grown + (inner + outer) * area * latents)
        return (kept + peak) * dtype.itemsize


def read_tiny_config(folder: str | Path) -> TinyVAEConfig:
    """The sizes in the config.json of a TinyVAE's folder.

    Raises:
        UserError: it is missing, has other keys, or its values make no TinyVAE.
    """
    file = Path(folder) / CONFIG_FILE
    values = read_json(file, dict)
    if unknown := set(values) - {field.name for field in fields(TinyVAEConfig)}:
        raise UserError(f"{folder}: config.json is not a TinyVAE's: it has the unknown keys {sorted(unknown)}")
    return check_schema(values, TinyVAEConfig, f"{file}: not a TinyVAE's")


TINY_VAE_PRESETS: dict[str, TinyVAEConfig] = {
    "taew2.1": TinyVAEConfig(),
    "shapes": TinyVAEConfig(
        patch_size=4,
        encoder_widths=(48, 16),
        decoder_widths=(64, 48),
        encoder_blocks=0,
        decoder_blocks=1,
        spatial_strides=(1,),
        temporal_strides=(4,),
        latent_limit=12.0,
        first_frame_alone=True,
    ),
}


def channels_last(x: Tensor) -> Tensor:
    """[n h w c] -> a view [n c h w]."""
    return x.permute(0, 3, 1, 2)


def _conv(n_in: int, n_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """Bends latents softly into (-limit, limit)."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.limit) * self.limit


class MemBlock(nn.Module):
    """Residual block that sees each frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Frames [(B t) c h w] and, at the same places, their predecessors."""
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Merges each `stride` successive frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(channels_last(rearrange(x, "(n s) c h w -> n h w (s c)", s=self.stride)))


class TGrow(nn.Module):
    """Splits each frame into `stride` successive ones and repeats pixels `scale` times along both sides.

    The published network repeats pixels first; a 1x1 convolution commutes with that and is cheaper before it.
    """

    def __init__(self, width: int, stride: int, scale: int) -> None:
        super().__init__()
        self.stride = stride
        self.scale = scale
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(rearrange(self.conv(x), "n (s c) h w -> (n s) h w c", s=self.stride))
        return F.interpolate(x, scale_factor=self.scale) if self.scale > 1 else x


def _build_encoder(config: TinyVAEConfig) -> nn.Sequential:
    widths = config.encoder_widths
    layers: list[nn.Module] = [_conv(3 * config.patch_size**2, widths[0]), nn.ReLU()]
    for i, (scale, stride) in enumerate(zip(config.spatial_strides, config.temporal_strides, strict=True)):
        layers += [TPool(widths[i], stride), _conv(widths[i], widths[i + 1], stride=scale, bias=False)]
        layers += [MemBlock(widths[i + 1]) for _ in range(config.encoder_blocks)]
    return nn.Sequential(*layers, _conv(widths[-1], config.latent_channels))


def _build_decoder(config: TinyVAEConfig) -> nn.Sequential:
    widths = config.decoder_widths
    layers: list[nn.Module] = [Clamp(config.latent_limit), _conv(config.latent_channels, widths[0]), nn.ReLU()]
    strides = zip(reversed(config.spatial_strides), reversed(config.temporal_strides), strict=True)
    for i, (scale, stride) in enumerate(strides):
        layers += [MemBlock(widths[i]) for _ in range(config.decoder_blocks)]
        # The identity stands where the published network repeats pixels, so that parameter names agree.
        layers += [nn.Identity(), TGrow(widths[i], stride, scale), _conv(widths[i], widths[i + 1], bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * config.patch_size**2))


def _infer_config(state: StateDict, source: str) -> TinyVAEConfig:
    """Sizes read off the tensors' shapes, but for `spatial_strides`, which leave no trace there."""

    def shapes(part: str, suffix: str) -> list[torch.Size]:
        names = (f"{part}.{index}.{suffix}" for index in layer_numbers(state, part))
        return [state[name].shape for name in names if name in state]

    encoder, decoder, pools = shapes("encoder", "weight"), shapes("decoder", "weight"), shapes("encoder", "conv.weight")
    if (
        len(encoder) < 2
        or len(decoder) < 2
        or not pools
        or encoder[0][1] % 3
        or any(len(shape) != 4 for shape in (*encoder, *decoder, *pools))
    ):
        raise UserError(f"{source}: is not a TAEHV: its tensors are not those of such an encoder and decoder")
    stages = len(pools)
    return TinyVAEConfig(
        patch_size=math.isqrt(encoder[0][1] // 3),
        latent_channels=encoder[-1][0],
        encoder_widths=tuple(shape[0] for shape in encoder[:-1]),
        decoder_widths=tuple(shape[0] for shape in decoder[:-1]),
        encoder_blocks=len(shapes("encoder", "conv.0.weight")) // stages,
        decoder_blocks=len(shapes("decoder", "conv.0.weight")) // stages,
        spatial_strides=(2,) * stages,
        temporal_strides=tuple(shape[1] // shape[0] for shape in pools),
    )


def _run(layers: nn.Sequential, x: Tensor, memory: Memory) -> Tensor:
    """Run all frames of a chunk [B t c h w] as one batch; reads and updates the memory of the stream."""
    batch = x.shape[0]
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for index, layer in enumerate(layers):
        if isinstance(layer, MemBlock):
            frames = rearrange(x, "(b t) c h w -> b t h w c", b=batch)
            before = memory[index] if index in memory else torch.zeros_like(frames[:, :1])
            memory[index] = frames[:, -1:].clone()
            x = layer(x, channels_last(torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1)))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1))


class TinyVAE(nn.Module):
    """A `VideoCodec`; parameter names are those of the published TAEHV weights."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.spatial_scale = config.spatial_scale
        self.temporal_scale = config.temporal_scale
        self.encoder = _build_encoder(config)
        self.decoder = _build_decoder(config)
        self.to(memory_format=torch.channels_last)

    def num_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` decode to: the first latent gives 1, each later one `temporal_scale`."""
        return 1 + (latent_frames - 1) * self.temporal_scale

    def num_latents(self, frames: int) -> int:
        """Latent frames that `frames` pixel frames encode to.

        Raises:
            ValueError: there is no frame, or the first one stands alone and the others do not fill whole latents.
        """
        if frames < 1:
            raise ValueError(f"frames={frames} must be positive")
        if self.config.first_frame_alone and (frames - 1) % self.temporal_scale:
            raise ValueError(f"frames={frames} is not 1 plus a multiple of temporal_scale={self.temporal_scale}")
        return math.ceil(frames / self.temporal_scale)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> latents [B f C h w].

        Raises:
            ValueError: H or W is not a multiple of `spatial_scale`, or F does not suit (see `num_latents`).
        """
        missing = self.num_latents(frames.shape[1]) * self.temporal_scale - frames.shape[1]
        if self.config.first_frame_alone:
            frames = torch.cat([frames[:, :1].expand(-1, missing, -1, -1, -1), frames], dim=1)
        else:
            frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return self._encode_whole(frames, {})

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Latents [B f C h w] -> frames [B F 3 H W] with F = num_frames(f); in [-1, 1] unless `clamp` is off.

        Training turns `clamp` off: a clamped pixel has no gradient.
        """
        frames = self._decode_whole(latents, {})[:, self.temporal_scale - 1 :]
        return frames.clamp(-1, 1) if clamp else frames

    def decode_bytes(self, height: int, width: int, latents: int) -> int:
        """See `TinyVAEConfig.decode_bytes`."""
        return self.config.decode_bytes(height, width, latents, self.encoder[0].weight.dtype)

    def streaming_encoder(self) -> "StreamingTinyEncoder":
        """An encoder with its own state, for one stream of frames."""
        return StreamingTinyEncoder(self)

    def streaming_decoder(self) -> "StreamingTinyDecoder":
        """A decoder with its own state, for one stream of latents."""
        return StreamingTinyDecoder(self)

    def _encode_whole(self, frames: Tensor, memory: Memory) -> Tensor:
        """Frames [B (f s) 3 H W] that fill whole latents -> latents [B f C h w]."""
        if frames.shape[2] != 3 or frames.shape[-1] % self.spatial_scale or frames.shape[-2] % self.spatial_scale:
            raise ValueError(
                f"frames {tuple(frames.shape)} are not [B F 3 H W] with sides a multiple of {self.spatial_scale}"
            )
        frames = (frames.to(self.encoder[0].weight.dtype) + 1) / 2
        return _run(self.encoder, F.pixel_unshuffle(frames, self.config.patch_size), memory)

    def _decode_whole(self, latents: Tensor, memory: Memory) -> Tensor:
        """Latents [B f C h w] -> all their frames [B (f s) 3 H W], unclamped."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)} are not [B f {self.latent_channels} h w]")
        frames = _run(self.decoder, latents.to(self.encoder[0].weight.dtype), memory)
        return F.pixel_shuffle(frames, self.config.patch_size) * 2 - 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        save_folder(folder, self, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TinyVAE":
        """Read what `save_pretrained` wrote; every name and shape must agree.

        Raises:
            UserError: a file is missing, unreadable, or not a TinyVAE's.
        """
        return cls.from_file(folder, read_tiny_config(folder))

    @classmethod
    def from_file(cls, path: str | Path, config: TinyVAEConfig | None = None) -> "TinyVAE":
        """Read weights under the published names from a folder, .safetensors or .pth (e.g. taew2_1.pth).

        Args:
            config: None reads the sizes off the weights, taking each stage to halve both sides as published.

        Raises:
            UserError: the file is missing, unreadable, or its names or shapes are not those of `config`.
        """
        weights = load_state_dict(path)
        config = _infer_config(weights, str(path)) if config is None else config
        with torch.device("meta"):
            model = cls(config)
        for index, layer in enumerate(model.decoder):
            name = f"decoder.{index}.conv.weight"
            # Published files may hold a TGrow trained with a longer stride: its last frames are the ones to keep.
            if isinstance(layer, TGrow) and name in weights:
                weights[name] = weights[name][-len(layer.conv.weight) :]
        load_into(model, weights, source=str(path), dtype=torch.float32)
        return model.to(memory_format=torch.channels_last).eval()


class StreamingTinyDecoder:
    """A `StreamingDecoder`: keeps one past frame per MemBlock, so its memory does not grow with the stream."""

    def __init__(self, codec: TinyVAE) -> None:
        self._codec = codec
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._memory: Memory = {}
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        frames = self._codec._decode_whole(latents, self._memory).clamp(-1, 1)
        trimmed = 0 if self._started else self._codec.temporal_scale - 1
        self._started = True
        return frames[:, trimmed:]


class StreamingTinyEncoder:
    """Encodes one endless stream of frames chunk after chunk; the chunks joined equal one full encode."""

    def __init__(self, codec: TinyVAE) -> None:
        self._codec = codec
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one."""
        self._memory: Memory = {}
        self._started = False

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next chunk: frames [B F 3 H W] in [-1, 1] -> latents [B f C h w].

        Raises:
            ValueError: F is not a multiple of `temporal_scale` (plus 1 in the first chunk if the first frame is alone).
        """
        scale = self._codec.temporal_scale
        if self._codec.config.first_frame_alone and not self._started:
            frames = torch.cat([frames[:, :1].expand(-1, scale - 1, -1, -1, -1), frames], dim=1)
        if frames.shape[1] == 0 or frames.shape[1] % scale:
            raise ValueError(f"a chunk of {frames.shape[1]} frames does not fill whole latents of {scale} frames")
        latents = self._codec._encode_whole(frames, self._memory)
        self._started = True
        return latents
