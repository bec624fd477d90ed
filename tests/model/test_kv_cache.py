"""The cache returns exactly the visible frames, without copies where nothing is learned, in constant memory."""

import pytest
import torch
from torch import Tensor

from model.attention import visible_frames
from model.kv_cache import KVCache
from tests.parity import random, relative_error, tiny_denoiser

TOKENS, HEADS, DIM = 2, 2, 4


def labelled(start: int, frames: int, batch: int = 1) -> Tensor:
    """Keys whose every entry is their absolute frame index."""
    index = torch.arange(start, start + frames, dtype=torch.float32)
    return index.view(1, -1, 1, 1, 1).expand(batch, -1, TOKENS, HEADS, DIM).clone()


def frames_of(keys: Tensor) -> list[int]:
    """The labels in keys [B S N D], sorted; every token of a frame must be there."""
    labels = keys[:, :, 0, 0].unflatten(1, (-1, TOKENS))
    assert (labels == labels[:1, :, :1]).all()
    return sorted(labels[0, :, 0].int().tolist())


def expected_frames(end, window, sink):
    return [frame for low, high in visible_frames(end, window, sink) for frame in range(low, high)]


CASES = [
    ([3] * 8, None, 0),
    ([3] * 8, 6, 0),
    ([3] * 8, 7, 1),
    ([3] * 8, 8, 2),
    ([3] * 8, 5, 0),
    ([1] * 20, 4, 3),
    ([1] + [3] * 6, 6, 1),
    ([2, 3, 3, 3, 3], 7, 0),
    ([4, 1, 2, 3, 4, 1, 4], 9, 4),
]


@torch.no_grad()
@pytest.mark.parametrize("append_only", [False, True])
@pytest.mark.parametrize("total_known", [False, True])
@pytest.mark.parametrize(("sizes", "window", "sink"), CASES)
def test_every_pass_sees_the_window_and_the_sink_and_itself(sizes, window, sink, total_known, append_only):
    cache = KVCache(1, window=window, sink=sink, append_only=append_only)
    cache.reset(sum(sizes) if total_known else None)
    start = 0
    for size in sizes:
        for attempt in (0.25, 0.0):  # a chunk's later passes overwrite its own slots, and only those
            k = labelled(start, size) + attempt
            keys, values = cache.extend(0, k, -k, start)
            assert torch.equal(values, -keys)
            live = (keys[0, :, 0, 0] % 1 == attempt).sum().item()
            assert live == (size * TOKENS if attempt else keys.shape[1])
            assert frames_of(keys.floor()) == expected_frames(start + size, window, sink)
        start += size


@pytest.mark.parametrize(("sizes", "window", "sink"), CASES)
def test_under_grad_it_joins_detached_context_and_live_keys_and_writes_nothing(sizes, window, sink):
    cache = KVCache(1, window=window, sink=sink, append_only=True)
    start = 0
    for size in sizes:
        live = (labelled(start, size) + 0.5).requires_grad_()
        keys, _ = cache.extend(0, live, live, start)
        assert frames_of(keys.floor()) == expected_frames(start + size, window, sink)
        assert (keys % 1 == 0.5).sum() == live.numel()
        keys.sum().backward()
        assert torch.equal(live.grad, torch.ones_like(live))
        with torch.no_grad():
            committed = labelled(start, size).requires_grad_()
            cache.extend(0, committed, committed, start)
        start += size


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(6, 0), (7, 1), (4, 1)])
def test_without_grad_nothing_is_copied_and_memory_stays_flat(window, sink):
    """The keys are a view of one buffer of window frames, for 200 chunks and for frame a million."""
    cache = KVCache(1, window=window, sink=sink)
    where = set()
    for start in [*range(0, 600, 3), 10**6]:
        k = labelled(start, 3, batch=2)
        keys, values = cache.extend(0, k, k, start)
        if start >= window:
            where.add((keys.data_ptr(), keys.untyped_storage().nbytes(), values.data_ptr()))
    assert len(where) == 1
    assert where.pop()[1] == 2 * window * TOKENS * HEADS * DIM * 4


@torch.no_grad()
def test_without_a_window_a_known_length_is_allocated_once_and_read_in_place():
    cache = KVCache(1)
    cache.reset(12)
    where = set()
    for start in range(0, 12, 3):
        keys, _ = cache.extend(0, labelled(start, 3), labelled(start, 3), start)
        where.add((keys.data_ptr(), keys.untyped_storage().nbytes()))
    assert where == {(keys.data_ptr(), 12 * TOKENS * HEADS * DIM * 4)}


@torch.no_grad()
def test_one_cache_serves_any_batch_resolution_and_dtype_in_turn():
    cache = KVCache(1)
    for batch, tokens, dtype in [
        (1, 2, torch.float32),
        (3, 2, torch.float32),
        (3, 5, torch.float32),
        (3, 5, torch.bfloat16),
    ]:
        for start in (0, 3):
            k = torch.full((batch, 3, tokens, HEADS, DIM), float(start), dtype=dtype)
            keys, _ = cache.extend(0, k, k, start)
            assert keys.shape == (batch, (start + 3) * tokens, HEADS, DIM) and keys.dtype == dtype
            assert (keys[:, -1] == start).all() and not keys[:, 0].any()


@torch.no_grad()
def test_text_keys_are_computed_once_a_prompt():
    denoiser = tiny_denoiser()
    calls = []
    for block in denoiser.transformer.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    layers, cache = len(denoiser.transformer.blocks), KVCache(2)
    first, second = random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    outputs = []
    for start, prompt, computed in [(0, first, 1), (3, first, 1), (3, first, 1), (3, second, 2), (3, second, 2)]:
        latents, timesteps = random(1, 3, 4, 4, 6, seed=start), torch.full((1, 3), 500.0)
        outputs.append(denoiser(latents, timesteps, prompt, cache=cache, start_frame=start).x0)
        assert len(calls) == computed * layers
    assert torch.equal(outputs[1], outputs[2]) and torch.equal(outputs[3], outputs[4])
    assert relative_error(outputs[3], outputs[2]) > 1e-3
    cache.reset()
    denoiser(latents, timesteps, second, cache=cache)
    assert len(calls) == 3 * layers


def extend(cache, shape, start):
    return cache.extend(0, torch.zeros(shape), torch.zeros(shape), start)


def test_misuse_is_refused():
    shape = (1, 3, TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="a rolling KVCache cannot be used under grad"):
        extend(KVCache(1, window=6), shape, 0)
    with torch.no_grad():
        with pytest.raises(ValueError, match="a chunk of 3 frames does not fit the window: window=4 less sink=2"):
            extend(KVCache(1, window=4, sink=2), shape, 0)
        cache = KVCache(1)
        extend(cache, shape, 0)
        with pytest.raises(ValueError, match=r"at frame 3 do not continue the cached .*reset\(\)"):
            extend(cache, (2, 3, TOKENS, HEADS, DIM), 3)
    with pytest.raises(ValueError, match="sink=6 must be at least 0 and smaller than window=6"):
        KVCache(1, window=6, sink=6)
