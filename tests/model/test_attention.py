"""Masks say which frames attend to which, and attention follows them."""

import pytest
import torch
import torch.nn.functional as F

from model.attention import (
    attention,
    block_causal_mask,
    chunk_ranges,
    flex_mask,
    teacher_forcing_mask,
    visible_frames,
)
from tests.parity import random, relative_error

LAYOUTS = [(9, 3, False), (6, 1, False), (8, 4, False), (7, 3, True), (5, 2, True), (1, 3, True), (12, 3, False)]
WINDOWS = [(None, 0), (3, 0), (4, 1), (5, 0), (6, 3), (7, 2), (50, 7)]


def sees(query, key, chunks, window, sink):
    """Return whether a query frame attends to a key frame, by the definition."""
    end = next(end for _, end in chunks if query < end)
    if key >= end:
        return False
    return window is None or end <= window or key < sink or key >= end - (window - sink)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_block_causal_mask_is_its_definition(layout, window, sink):
    frames, size, independent = layout
    chunks = chunk_ranges(*layout)
    mask = block_causal_mask(frames, size, window=window, sink=sink, independent_first_frame=independent).dense()
    for query in range(frames):
        for key in range(frames):
            assert mask[query, key] == sees(query, key, chunks, window, sink), (query, key)
    assert window is None or mask.sum(1).max() <= window


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_teacher_forcing_shows_noisy_chunks_clean_history_and_themselves(layout, window, sink):
    frames, size, independent = layout
    chunks = chunk_ranges(*layout)
    mask = teacher_forcing_mask(frames, size, window=window, sink=sink, independent_first_frame=independent)
    assert mask.positions == tuple(range(frames)) * 2
    dense = mask.dense()
    assert not dense[:frames, frames:].any()
    for query in range(frames):
        start, end = next(chunk for chunk in chunks if query < chunk[1])
        for key in range(frames):
            visible = sees(query, key, chunks, window, sink)
            assert dense[query, key] == visible
            assert dense[frames + query, key] == (visible and key < start)
            assert dense[frames + query, frames + key] == (start <= key < end)


def test_visible_frames_never_repeat_a_frame():
    for end in range(1, 30):
        for window in range(1, 12):
            for sink in range(window):
                frames = [frame for low, high in visible_frames(end, window, sink) for frame in range(low, high)]
                assert len(set(frames)) == len(frames) == min(end, window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [block_causal_mask, teacher_forcing_mask])
def test_masked_attention_equals_one_product_with_a_boolean_mask(layout, make):
    frames, size, independent = layout
    mask = make(frames, size, window=max(5, size), sink=1, independent_first_frame=independent)
    tokens, total = 3, len(mask.positions)
    q, k, v = (random(2, total * tokens, 2, 8, seed=seed) for seed in range(3))
    dense = mask.dense().repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense).transpose(1, 2)
    assert relative_error(attention(q, k, v, mask=mask), expected) <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "better"),
    [((7, 3, False), "use 6 or 9"), ((9, 3, True), "use 7 or 10"), ((2, 3, False), "use 3 or 3")],
)
def test_frames_that_do_not_divide_are_refused_with_the_nearest_that_do(arguments, better):
    with pytest.raises(ValueError, match=rf"num_frames={arguments[0]} is not .*frames_per_chunk=3; {better}"):
        chunk_ranges(*arguments)


def test_a_bias_is_added_to_the_logits_of_every_query():
    q, k, v = (random(2, length, 2, 8, seed=length) for length in (6, 5, 5))
    bias = random(2, 1, 1, 5, seed=9)
    logits = torch.einsum("blnd,bsnd->bnls", q, k) / 8**0.5 + bias
    expected = torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), v)
    assert relative_error(attention(q, k, v, bias=bias), expected) <= 1e-5


@pytest.mark.parametrize("make", [block_causal_mask, teacher_forcing_mask])
def test_the_mask_of_a_gpu_is_the_same_mask(make):
    """The mask is built on the CPU without compilation: which blocks of 128 tokens and which entries count."""
    mask = make(6, 3, window=5, sink=1)
    tokens = 50
    blocks = flex_mask.__wrapped__(mask, tokens, torch.device("cpu"), compiled=False).blocks
    length = tokens * len(mask.positions)
    rows, columns = (torch.arange(length)[:, None], torch.arange(length)[None])
    dense = mask.dense().repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    entries = blocks.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
    assert torch.equal(entries, dense)
    computed = blocks.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (dense & ~computed[:length, :length]).any()


@pytest.mark.gpu
def test_flex_equals_the_cpu():
    mask = teacher_forcing_mask(6, 3, window=4, sink=1)
    q, k, v = (random(2, 12 * 24, 2, 32, seed=seed) for seed in range(3))
    on_gpu = attention(*(x.cuda() for x in (q, k, v)), mask=flex_mask(mask, 24, torch.device("cuda"))).cpu()
    assert relative_error(on_gpu, attention(q, k, v, mask=mask)) <= 1e-4
