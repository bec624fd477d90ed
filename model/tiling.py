"""Decodes a large frame tile by tile, so that memory depends on the size of a tile.

Legend: B clips, F pixel frames, H W pixel size, f latent frames, C latent channels, h w latent size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.codec import StreamingDecoder


@dataclass(frozen=True)
class TileConfig:
    """How frames are cut. Tiles are square and evenly spaced, so neighbours may share more than `overlap`."""

    tile: int = 256
    """Side of a tile in pixels."""
    overlap: int = 64
    """The least number of pixels that neighbouring tiles share. There one fades linearly into the other."""

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.tile <= self.overlap:
            raise ValueError(
                f"tile={self.tile} pixels must be above overlap={self.overlap}, and overlap must be at least 0"
            )


@dataclass(frozen=True)
class Tile:
    """A rectangle of latents, and the blending weight [H W] of each of its pixels."""

    rows: slice
    columns: slice
    share: Tensor


def cut(height: int, width: int, config: TileConfig, *, scale: int) -> list[Tile]:
    """Cut h x w latents into tiles. The blending weights sum to one at every pixel.

    Raises:
        ValueError: `scale`, the pixels along a latent's side, does not divide the tile or the overlap.
    """
    if config.tile % scale or config.overlap % scale:
        raise ValueError(f"tile={config.tile} and overlap={config.overlap} must be multiples of {scale} pixels")
    rows, columns = (list(_intervals(size, config, scale)) for size in (height, width))
    return [Tile(row, column, y[:, None] * x) for row, y in rows for column, x in columns]


def _intervals(size: int, config: TileConfig, scale: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield intervals that cover `size` latents, each with the blending weights of its pixels."""
    tile, overlap = min(config.tile // scale, size), config.overlap // scale
    count = math.ceil((size - overlap) / (tile - overlap)) if size > tile else 1
    starts = [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)]
    weights = []
    for start in starts:
        inside = torch.arange(tile * scale) + 0.5
        from_left = inside if start else torch.full_like(inside, torch.inf)
        from_right = inside.flip(0) if start + tile < size else torch.full_like(inside, torch.inf)
        weights.append((torch.minimum(from_left, from_right) / max(config.overlap, 1)).clamp(max=1))
    total = torch.zeros(size * scale)
    pixels = [slice(start * scale, (start + tile) * scale) for start in starts]
    for weight, place in zip(weights, pixels, strict=True):
        total[place] += weight
    for start, weight, place in zip(starts, weights, pixels, strict=True):
        yield slice(start, start + tile), weight / total[place]


def decode_tiles(tiles: list[Tile], latents: Tensor, decode: Callable[[int, Tensor], Tensor], *, scale: int) -> Tensor:
    """Decode latents [B f C h w] to frames [B F 3 H W]. `decode(i, part)` returns the frames of tile i."""
    whole = None
    for index, tile in enumerate(tiles):
        frames = decode(index, latents[..., tile.rows, tile.columns])
        if whole is None:
            whole = frames.new_zeros(*frames.shape[:3], *(size * scale for size in latents.shape[-2:]))
        rows, columns = (slice(part.start * scale, part.stop * scale) for part in (tile.rows, tile.columns))
        whole[..., rows, columns] += frames * tile.share.to(frames)
    return whole


class ParkingDecoder(StreamingDecoder, Protocol):
    """A `StreamingDecoder` whose state can be moved to another device."""

    def move_state(self, device: torch.device | str) -> None:
        """Move the state of the stream to `device`."""
        ...


class TiledDecoder:
    """A `StreamingDecoder` with one stream for each tile. On a GPU, the state of inactive tiles waits in RAM."""

    def __init__(self, make: Callable[[], ParkingDecoder], config: TileConfig, *, scale: int) -> None:
        """`make` returns a decoder for one tile. `scale`: pixels along a latent's side."""
        self._make, self._config, self._scale = make, config, scale
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next chunk begins a new one, of any size."""
        self._tiles: list[Tile] = []
        self._decoders: list[ParkingDecoder] = []

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk: [B f C h w] -> frames [B F 3 H W] in [-1, 1]; the first latent gives 1 frame."""
        if not self._tiles:
            self._tiles = cut(*latents.shape[-2:], self._config, scale=self._scale)
            self._decoders = [self._make() for _ in self._tiles]
        return decode_tiles(self._tiles, latents, self._decode_tile, scale=self._scale)

    def _decode_tile(self, index: int, latents: Tensor) -> Tensor:
        decoder = self._decoders[index]
        decoder.move_state(latents.device)
        frames = decoder.decode(latents)
        decoder.move_state("cpu")
        return frames
