"""Runs passes of several rollouts as one batch. Each rollout has its own cache and may join or leave at any time.

Shapes: B lanes of a batch, F frames of a chunk, T tokens a frame, N heads, D head dim, L text tokens, S keys seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.kv_cache import CachedText, KVCache
from model.layer_cache import ChunkSlots, KeyLayout, LayerCache
from pipeline.rollout import Pass


@dataclass(frozen=True)
class JoinedChunk:
    """The :class:`ChunkSlots` of several samples, each with its own cache."""

    lanes: list[ChunkSlots]
    frames: int


@dataclass(frozen=True)
class JoinedLayer:
    """The :class:`LayerCache` of several samples, each with its own cache."""

    lanes: list[LayerCache]

    def extend(self, k: Tensor, v: Tensor, chunk: JoinedChunk) -> tuple[Tensor, Tensor]:
        """Like :meth:`LayerCache.extend`, for each sample. All samples see the same number of keys, [B S N D]."""
        rows = zip(self.lanes, k.split(1), v.split(1), chunk.lanes, strict=True)
        keys, values = zip(*(lane.extend(*row) for lane, *row in rows), strict=True)
        return torch.cat(keys), torch.cat(values)


class JoinedCache:
    """The caches of several samples, in the form of one cache of a batch."""

    def __init__(self, lanes: Sequence[Pass]) -> None:
        self.caches: list[KVCache] = [lane.cache for lane in lanes]
        self.embeds = [lane.prompt_embeds for lane in lanes]

    @property
    def layers(self) -> list[JoinedLayer]:
        """Like :attr:`KVCache.layers`."""
        return [JoinedLayer(list(lanes)) for lanes in zip(*(cache.layers for cache in self.caches), strict=True)]

    def open(
        self, layout: KeyLayout, start_frame: Sequence[int], frames: int, *, keep_graph: bool = False
    ) -> JoinedChunk:
        """Like :meth:`KVCache.open`, with a start frame for each sample."""
        lane = layout._replace(batch=1)
        starts = zip(self.caches, start_frame, strict=True)
        return JoinedChunk([cache.open(lane, start, frames, keep_graph=keep_graph) for cache, start in starts], frames)

    def text(self, prompt_embeds: Tensor, compute: Callable[[], list[CachedText]]) -> list[CachedText]:
        """Like :meth:`KVCache.text`. Each lane stores its own rows. If one lane has none, all are computed."""
        computed: list[CachedText] = []

        def row(index: int) -> list[CachedText]:
            if not computed:
                computed.extend(compute())
            return [CachedText(*(None if x is None else x[index : index + 1] for x in layer)) for layer in computed]

        rows = [
            cache.text(embeds, lambda index=index: row(index))
            for index, (cache, embeds) in enumerate(zip(self.caches, self.embeds, strict=True))
        ]
        return [CachedText.batch(layers) for layers in zip(*rows, strict=True)]


@torch.inference_mode()
def run_together(denoiser: Denoiser, passes: Sequence[Pass]) -> list[Tensor]:
    """Return x0 [1 f C H W] of each pass. Passes of equal timestep, shape and number of seen frames form a batch."""
    groups: dict[tuple, list[int]] = {}
    for index, one in enumerate(passes):
        shapes = one.latents.shape, one.chunk_frames, one.prompt_embeds.shape
        groups.setdefault((one.stage, one.timestep, _seen(one), *shapes), []).append(index)
    results: dict[int, Tensor] = {}
    for indices in groups.values():
        x0 = _joined([passes[index] for index in indices]).run(denoiser)
        results |= dict(zip(indices, x0.split(1), strict=True))
    return [results[index] for index in range(len(passes))]


def _seen(one: Pass) -> int:
    """Return how many frames the pass, or its first chunk, sees."""
    end = one.start_frame + (one.chunk_frames or one.latents.shape[1:2])[0]
    return end if one.cache.window is None else min(end, one.cache.window)


def _joined(lanes: Sequence[Pass]) -> Pass:
    """Join several passes that agree into one."""
    if len(lanes) == 1:
        return lanes[0]
    return replace(
        lanes[0],
        latents=torch.cat([one.latents for one in lanes]),
        prompt_embeds=torch.cat([one.prompt_embeds for one in lanes]),
        cache=JoinedCache(lanes),
        start_frame=tuple(one.start_frame for one in lanes),
    )
