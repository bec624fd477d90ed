"""The cache returns exactly the visible frames. Without gradient it makes no copies and needs constant memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import AttentionBackend, visible_frames
from model.kv_cache import CachedText, KVCache
from model.layer_cache import KeyLayout, LayerBuffers
from tests.parity import TINY, random, relative_error, tiny_denoiser

TOKENS, HEADS, DIM = 2, 2, 4


def labelled(start: int, frames: int, batch: int = 1) -> Tensor:
    """Return keys in which every entry is the absolute index of the frame."""
    index = torch.arange(start, start + frames, dtype=torch.float32)
    return index.view(1, -1, 1, 1, 1).expand(batch, -1, TOKENS, HEADS, DIM).clone()


def frames_of(keys: Tensor) -> list[int]:
    """Return the sorted labels in keys [B S N D]. Every token of a frame must be there."""
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
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("sizes", "window", "sink"), CASES)
def test_slots_told_as_data_are_the_same_slots(sizes, window, sink, relative):
    caches = [KVCache(1, window=window, sink=sink, relative=relative) for _ in range(2)]
    start = 0
    for size in sizes:
        k = random(1, size, TOKENS, HEADS, 8, seed=start)
        layout = KeyLayout.of(k)
        chunks, extended = [], []
        for cache, static in zip(caches, (False, True), strict=True):
            chunks.append(cache.open(layout._replace(static=static), start, size))
            extended.append(cache.layers[0].extend(k, -k, chunks[-1]))
        assert (chunks[0].index, chunks[1].index.shape) == (None, (size,))
        assert all(torch.equal(*pair) for pair in zip(*extended, strict=True))
        start += size


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(6, 0), (7, 1), (4, 1)])
def test_without_grad_nothing_is_copied_and_memory_stays_flat(window, sink):
    """The keys are a view of one buffer of the window's size, for 200 chunks and for frame one million."""
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


def in_window(finished: Tensor, end: int, window: int, sink: int) -> Tensor:
    """Return the frames that a chunk ending at `end` attends to, in order."""
    return torch.cat([finished[:, low:high] for low, high in visible_frames(end, window, sink)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("append_only", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(6, 0), (7, 1), (6, 3), (9, 4)])
def test_relative_positions_count_from_the_first_frame_in_the_window(window, sink, append_only):
    """With one layer, the result equals attention over only the window, with positions 0 to window - 1."""
    denoiser, clip = tiny_denoiser(replace(TINY, num_layers=1)), random(1, 36, 4, 4, 6)
    cache, embeds = (
        KVCache(1, window=window, sink=sink, relative=True, append_only=append_only),
        random(1, 5, 8, seed=1),
    )
    fixed = KVCache(1, window=window, sink=sink, append_only=append_only)
    for start in range(0, 36, 3):
        options = {"timesteps": torch.zeros(1, 3), "prompt_embeds": embeds, "start_frame": start}
        for _ in range(2):
            flow = denoiser(clip[:, start : start + 3], cache=cache, **options).flow
            absolute = denoiser(clip[:, start : start + 3], cache=fixed, **options).flow
        seen = in_window(clip, start + 3, window, sink)
        expected = denoiser(seen, torch.zeros(seen.shape[:2]), embeds).flow[:, -3:]
        assert relative_error(flow, expected) <= 1e-5
        travels = sink > 0 and start + 3 > window
        assert (relative_error(flow, absolute) > 1e-4) == travels


@torch.no_grad()
def test_relative_positions_look_the_same_a_million_frames_later_in_the_same_memory():
    denoiser, chunk, embeds, live = (
        tiny_denoiser(),
        random(1, 3, 4, 4, 6),
        random(1, 5, 8, seed=1),
        torch.zeros(1, 3, 6, 2, 16),
    )
    cache, flows = KVCache(2, window=7, sink=1, relative=True), []
    for start in [*range(0, 30, 3), *range(10**6, 10**6 + 12, 3)]:
        flows.append(denoiser(chunk, torch.zeros(1, 3), embeds, cache=cache, start_frame=start).flow)
    assert relative_error(flows[-1], flows[9]) <= 1e-5
    keys, _ = cache.extend(0, live, live, start)
    assert keys.untyped_storage().nbytes() == 7 * 6 * 32 * 4


def test_relative_positions_survive_recomputation_in_backward():
    """An early pass that is recomputed after the sink has moved finds the sink at its old position."""
    cache = KVCache(1, window=5, sink=2, relative=True, append_only=True)
    with torch.no_grad():
        for start in range(0, 15, 3):
            live = random(1, 3, TOKENS, HEADS, 8, seed=start)
            cache.extend(0, live, live, start)
    live, again = random(1, 3, TOKENS, HEADS, 8, seed=1), []
    for start in (3, 9, 3):
        again.append(cache.extend(0, live, live, start)[0])
    assert torch.equal(again[0], again[2])
    assert relative_error(again[1][:, : 2 * TOKENS], again[0][:, : 2 * TOKENS]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("append_only", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_restarted_cache_holds_the_sink_as_first_made_and_leaves_the_old_one_alone(relative, append_only):
    old = KVCache(1, window=6, sink=2, relative=relative, append_only=append_only)
    live = [random(1, 3, TOKENS, HEADS, 8, seed=index) for index in range(6)]
    for index in range(5):
        before, _ = old.extend(0, live[index], live[index], 3 * index)
    before = before.clone()
    kept, empty = old.restarted(keep_sink=True), old.restarted()
    keys, values = kept.extend(0, live[5], live[5], 2)
    expected = torch.cat([live[0][:, :2], live[5]], dim=1).flatten(1, 2)
    assert torch.equal(keys, expected) and torch.equal(values, expected)
    assert torch.equal(empty.extend(0, live[5], live[5], 0)[0], live[5].flatten(1, 2))
    assert torch.equal(old.extend(0, live[4], live[4], 12)[0], before)


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 7, "sink": 1, "relative": True}])
def test_several_chunks_in_one_pass_equal_one_pass_each(options, known):
    """Their outputs and the cached keys are equal. The last layer may skip outputs that are not needed."""
    denoiser, clip, embeds = tiny_denoiser(), random(2, 15, 4, 4, 6), random(2, 5, 8, seed=1)
    timesteps = torch.linspace(0, 900, 30).view(2, 15)
    caches = [KVCache(2, **options) for _ in range(3)]
    for cache in caches:
        cache.reset(15 if known else None)

    def run(cache, low, high, **rest):
        return denoiser(clip[:, low:high], timesteps[:, low:high], embeds, cache=cache, start_frame=low, **rest)

    alone = torch.cat([run(caches[0], low, low + 3).x0 for low in range(0, 15, 3)], dim=1)
    for low, high, sizes in ((0, 9, (3, 3, 3)), (9, 15, (3, 3))):
        assert relative_error(run(caches[1], low, high, chunk_frames=sizes).x0, alone[:, low:high]) <= 1e-5
        last = run(caches[2], low, high, chunk_frames=sizes, output_frames=3).x0
        assert relative_error(last, alone[:, high - 3 : high]) <= 1e-5
    nothing = run(caches[2], 12, 15, output_frames=0)
    assert nothing.x0.shape == nothing.flow.shape == (2, 0, 4, 4, 6)
    for cache in caches[1:]:
        live = torch.zeros(2, 3, 6, 2, 16)
        for layer in range(2):
            kept, expected = (c.extend(layer, live, live, 12)[0] for c in (cache, caches[0]))
            assert relative_error(kept, expected) <= 1e-5


@torch.no_grad()
def test_prompts_of_any_length_make_one_batch():
    denoiser = tiny_denoiser(replace(TINY, text_len=64))
    prompts = [
        random(1, 64, 8, seed=seed) * (torch.arange(64) < used)[:, None] for seed, used in enumerate((5, 20, 64))
    ]
    latents, timesteps = random(3, 3, 4, 4, 6), torch.full((3, 1), 500.0)
    texts = []
    for prompt in prompts:
        cache = KVCache(2)
        denoiser(latents[:1], timesteps[:1], prompt, cache=cache)
        texts.append(cache.text(prompt, list)[0])
    assert [text.k.shape[1] for text in texts] == [16, 32, 64]
    joined, x, attend = CachedText.batch(texts), random(3, 1, 4, 32), denoiser.transformer.blocks[0].cross_attn
    together = attend(x, joined, backend=AttentionBackend.sdpa)
    for index, text in enumerate(texts):
        alone = attend(x[index : index + 1], text, backend=AttentionBackend.sdpa)
        assert relative_error(together[index : index + 1], alone) <= 1e-5


def extend_and_keep(cache: KVCache, x: Tensor, start: int) -> Tensor:
    chunk = cache.open(KeyLayout.of(x), start, x.shape[1], keep_graph=True)
    return cache.layers[0].extend(x, x, chunk)[0]


@pytest.mark.parametrize("known", [None, 9])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 0), (7, 1)])
def test_kept_frames_get_gradient_through_later_chunks_that_see_them(window, sink, known):
    """The visible frames are the same with and without graph. After a repeated pass, only its own keys count."""
    cache = KVCache(1, window=window, sink=sink, append_only=True)
    cache.reset(known)
    replaced, *chunks = ((labelled(start, 3) + 0.0).requires_grad_() for start in (0, 0, 3, 6))
    extend_and_keep(cache, replaced, 0)
    for start, chunk in zip((0, 3), chunks, strict=False):
        extend_and_keep(cache, chunk, start)
    keys, _ = cache.extend(0, chunks[2], chunks[2], 6)
    assert frames_of(keys) == expected_frames(9, window, sink)
    keys.sum().backward()
    seen = [start + frame for start, chunk in zip((0, 3, 6), chunks, strict=True) for frame in reached(chunk.grad)]
    assert seen == expected_frames(9, window, sink) and replaced.grad is None
    with torch.no_grad():  # passes without grad, and after the graph was dropped, read the same values
        assert torch.equal(cache.extend(0, chunks[2], chunks[2], 6)[0], keys)
    cache.drop_graph()
    again, _ = cache.extend(0, chunks[2].detach(), chunks[2].detach(), 6)
    assert torch.equal(again, keys) and not again.requires_grad


def reached(gradient: Tensor | None) -> list[int]:
    """Return the numbers of the frames in a chunk whose gradient is not zero."""
    return [] if gradient is None else gradient.abs().amax(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()


def test_a_pass_without_grad_detaches_what_it_writes_again():
    cache, first, live = KVCache(1, append_only=True), labelled(0, 3).requires_grad_(), labelled(3, 3)
    extend_and_keep(cache, first, 0)
    assert cache.extend(0, live, live, 3)[0].requires_grad
    with torch.no_grad():
        cache.extend(0, first, first, 0)
    assert not cache.extend(0, live, live, 3)[0].requires_grad


def extend(cache, shape, start):
    return cache.extend(0, torch.zeros(shape), torch.zeros(shape), start)


def test_misuse_is_refused():
    shape = (1, 3, TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="a rolling KVCache cannot be used under grad"):
        extend(KVCache(1, window=6), shape, 0)
    for options in ({"fp8": True}, {"window": 6, "sink": 1, "relative": True}):
        with pytest.raises(ValueError, match="cannot keep the graph of its keys; use fp8=False, and no sink"):
            extend_and_keep(KVCache(1, append_only=True, **options), torch.zeros(shape), 0)
    with torch.no_grad():
        with pytest.raises(ValueError, match="a chunk of 3 frames does not fit the window: window=4 minus sink=2"):
            extend(KVCache(1, window=4, sink=2), shape, 0)
        cache = KVCache(1)
        extend(cache, shape, 0)
        with pytest.raises(ValueError, match=r"at frame 3 do not continue the cached .*reset\(\)"):
            extend(cache, (2, 3, TOKENS, HEADS, DIM), 3)
    with pytest.raises(ValueError, match="sink=6 must be at least 0 and smaller than window=6"):
        KVCache(1, window=6, sink=6)


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep_sink", [False, True])
def test_kept_buffers_give_what_new_ones_give_at_the_same_addresses(keep_sink, relative, fp8, monkeypatch):
    """Buffers are reused after a reset and by the next cache. Another layout gets new buffers."""
    made, zeros = [], KeyLayout.zeros
    monkeypatch.setattr(KeyLayout, "zeros", lambda *args, **options: made.append(1) or zeros(*args, **options))
    options = {"window": 6, "sink": 2, "relative": relative, "fp8": fp8}
    live = [random(1, 3, TOKENS, HEADS, 8, seed=index) for index in range(5)]
    buffers, counts, addresses = LayerBuffers(), [], []

    def run(cache) -> list[Tensor]:
        seen = [cache.extend(0, x, x, 3 * index)[0].clone() for index, x in enumerate(live)]
        cache = cache.restarted(keep_sink=keep_sink)
        start = 2 if keep_sink else 0
        seen += [cache.extend(0, x, x, start + 3 * index)[0].clone() for index, x in enumerate(live)]
        addresses.append(cache.layers[0].k.data.data_ptr())
        return seen

    expected = run(KVCache(1, **options))
    for _ in range(2):
        made.clear()
        again = run(KVCache(1, buffers=buffers, **options))
        counts.append(len(made))
        assert all(torch.equal(mine, other) for mine, other in zip(again, expected, strict=True))
    assert counts[0] > 0 and counts[1] == 0 and addresses[1] == addresses[2]
    KVCache(1, buffers=buffers, **options).extend(0, live[0].expand(2, -1, -1, -1, -1), live[0], 0)
    assert made
