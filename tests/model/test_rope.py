"""Rotary positions are relative, on three axes, at any frame."""

import pytest
import torch

from model.rope import apply_rotary, axis_pairs, rotary_table
from tests.parity import random, relative_error

CPU = torch.device("cpu")
HEAD_DIMS = [6, 14, 32, 48, 62, 64, 80, 96, 128]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_axes_share_out_all_pairs_and_time_takes_the_rest(head_dim):
    time, height, width = axis_pairs(head_dim)
    assert time + height + width == head_dim // 2
    assert height == width == head_dim // 2 // 3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_a_product_with_a_unit_complex_number(head_dim):
    frames, height, width = (7, 0, 7), 2, 3
    x = random(2, len(frames), height * width, 2, head_dim)
    split = axis_pairs(head_dim)
    frequencies = [10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs) for pairs in split]
    expected = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    for f, frame in enumerate(frames):
        for row in range(height):
            for column in range(width):
                positions = zip((frame, row, column), frequencies, strict=True)
                angles = torch.cat([position * frequency for position, frequency in positions])
                expected[:, f, row * width + column] *= torch.polar(torch.ones_like(angles), angles)
    rotated = apply_rotary(x, rotary_table(frames, height, width, head_dim, CPU))
    assert relative_error(rotated.double(), torch.view_as_real(expected).flatten(-2)) <= 1e-6


@pytest.mark.parametrize("shift", [1, 1000, 10**6])
def test_only_the_distance_between_frames_matters(shift):
    q, k = (random(1, 4, 6, 1, 32, seed=seed) for seed in range(2))

    def logits(start):
        table = rotary_table(tuple(range(start, start + 4)), 2, 3, 32, CPU)
        rotated = (apply_rotary(x, table).flatten(0, 3) for x in (q, k))
        return next(rotated) @ next(rotated).T

    assert relative_error(logits(shift), logits(0)) <= 2e-6


def test_frames_need_not_be_in_order_or_unique():
    x = random(1, 5, 6, 1, 32)
    frames = (4, 2, 4, 0, 2)
    together = apply_rotary(x, rotary_table(frames, 2, 3, 32, CPU))
    for index, frame in enumerate(frames):
        alone = apply_rotary(x[:, index : index + 1], rotary_table((frame,), 2, 3, 32, CPU))
        assert torch.equal(together[:, index : index + 1], alone)


def test_a_table_made_in_inference_mode_serves_training():
    """Tables are kept, so training may use a table that generation has made."""
    arguments = (tuple(range(77, 79)), 2, 3, 32, CPU)
    with torch.inference_mode():
        rotary_table(*arguments)
    x = random(1, 2, 6, 1, 32).requires_grad_()
    apply_rotary(x, rotary_table(*arguments)).sum().backward()
    assert x.grad is not None
