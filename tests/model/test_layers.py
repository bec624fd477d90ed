"""Faster layers compute the same values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.layers import GELU, LayerNorm, PatchEmbedding, SelfAttention
from model.rope import rotary_table
from tests.parity import random, relative_error


def test_gelu_is_torchs_tanh_gelu_with_and_without_grad():
    x = torch.cat([random(64, 32) * scale for scale in (0.1, 1.0, 30.0)])
    expected = F.gelu(x, approximate="tanh")
    before = x.clone()
    with torch.no_grad():
        assert relative_error(GELU()(x), expected) <= 1e-6
    assert torch.equal(x, before)
    assert torch.equal(GELU()(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 1, 1, 16), (1, 3, 1, 16), (2, 3, 1, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_modulation_is_the_same_for_one_timestep_and_many(shape, dtype, tolerance):
    norm, x = LayerNorm(16, 1e-6, elementwise_affine=False), random(2, 3, 5, 16)[: shape[0]].to(dtype)
    shift, scale = (random(*shape, seed=seed).to(dtype) for seed in (1, 2))
    result = norm.modulated(x, shift, scale)
    expected = F.layer_norm(x.float(), (16,), eps=1e-6) * (1 + scale.float()) + shift.float()
    assert result.dtype == dtype and relative_error(result.float(), expected) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 3), (1, 4, 1)])
def test_patch_embedding_is_the_convolution(patch):
    layer = PatchEmbedding(3, 8, kernel_size=patch, stride=patch)
    latents = random(2, 5, 3, 8, 12)
    expected = nn.Conv3d.forward(layer, latents.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
    tokens = layer(latents)
    assert tokens.is_contiguous() and relative_error(tokens, expected) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_joined_for_one_product_give_what_weights_joined_once_give(dtype):
    """They are equal to the last bit, because both are one product of the same matrices. Three products differ."""
    apart, joined = SelfAttention(128, 1, 1e-6).to(dtype), SelfAttention(128, 1, 1e-6).to(dtype)
    joined.load_state_dict(apart.state_dict())
    apart.fuse(keep_parts=True)
    joined.fuse()
    x, rotary = random(1, 3, 40, 128).to(dtype), rotary_table((0, 1, 2), 5, 8, 128, torch.device("cpu"))
    pairs = zip(apart.project(x, rotary), joined.project(x, rotary), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert apart.state_dict().keys() == joined.state_dict().keys()
