"""Tiles cover frames, share an overlap, and are blended smoothly."""

import pytest
import torch

from model.tiling import TileConfig, cut


@pytest.mark.parametrize("size", [(2, 3), (6, 10), (11, 7), (60, 104)])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (48, 16), (48, 40)])
def test_tiles_cover_every_pixel_with_shares_that_sum_to_one(size: tuple[int, int], tile: int, overlap: int) -> None:
    height, width = size
    total = torch.zeros(8 * height, 8 * width)
    for part in cut(height, width, TileConfig(tile, overlap), scale=8):
        assert part.share.min() > 0
        assert max(part.share.shape) <= tile
        rows, columns = (slice(8 * side.start, 8 * side.stop) for side in (part.rows, part.columns))
        total[rows, columns] += part.share
    assert torch.allclose(total, torch.ones_like(total))


def test_neighbours_share_the_overlap_and_fade_linearly() -> None:
    left, right = cut(2, 10, TileConfig(tile=48, overlap=16), scale=8)
    assert (left.columns, right.columns) == (slice(0, 6), slice(4, 10))
    fade = left.share[0, 32:]
    assert torch.allclose(fade, 1 - (torch.arange(16) + 0.5) / 16)
    assert torch.allclose(right.share[0, :16], 1 - fade)
    assert (left.share[:, :32] == 1).all()


def test_impossible_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap=64"):
        TileConfig(tile=64, overlap=64)
    with pytest.raises(ValueError, match="tile=50"):
        cut(8, 8, TileConfig(tile=50, overlap=8), scale=8)
