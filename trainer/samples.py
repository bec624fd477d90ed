"""Makes the sample videos of training, for a few fixed prompts. All processes share the work.

Shapes: b videos of one batch, F pixel frames, H W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import Ranks


def shared_rounds(count: int, ranks: Ranks, batch: int) -> list[list[int]]:
    """Return the indices that this process makes, round by round.

    Every process makes the same number of batches of the same size, because sharded weights need this. Indices from
    ``count`` on only fill the last round.
    """
    together = ranks.world_size * batch
    starts = range(ranks.rank * batch, -(-count // together) * together, together)
    return [list(range(start, start + batch)) for start in starts]


def make_together(make: Callable[[list[int]], Tensor], count: int, ranks: Ranks, *, batch: int) -> list[Tensor]:
    """Make ``count`` videos [F 3 H W], float32 on the CPU, in order. Only the main process gets them.

    Args:
        make: turns indices into videos [b F 3 H W]. A video must not depend on the other videos of its batch.
        batch: the most videos that a process makes at once. It limits the memory.
    """
    batch = min(batch, -(-count // ranks.world_size))
    videos: list[Tensor] = []
    for indices in shared_rounds(count, ranks, batch):
        clips = make([index % count for index in indices]).float().cpu().contiguous()
        videos += _gathered(clips, ranks)
    return videos[:count]


def _gathered(clips: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return the clips of every process, in the order of the processes, on the main process."""
    if ranks.world_size == 1:
        return list(clips)
    parts = [torch.empty_like(clips) for _ in range(ranks.world_size)] if ranks.is_main else None
    dist.gather(clips, parts)
    return [] if parts is None else list(torch.cat(parts))
