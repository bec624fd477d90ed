"""Each Triton kernel equals the plain computation; Triton's interpreter runs it on CPU tensors, in another process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model.fused import can_fuse

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}  # the plain computation rounds between its steps, a kernel once


def compare() -> dict[str, dict[str, float]]:
    """Relative difference of every case, by kernel and dtype. Run with TRITON_INTERPRET=1."""
    import torch.nn.functional as F

    from model.layers import FusedProjection, LayerNorm, SelfAttention
    from model.rope import rotary_table
    from model.triton_kernels import layer_norm_modulate, norm_rotary, rms_silu
    from model.wan_decoder import NORM_FLOOR, ChannelNorm
    from tests.parity import random, relative_error

    def rms_silu_case(dtype: torch.dtype) -> float:
        worst = 0.0
        for shape in ((2, 3, 5, 96), (1, 2, 2, 384), (3, 1, 1, 24)):
            x, norm = random(*shape).to(dtype), ChannelNorm(shape[-1], ndim=3)
            norm.gamma.data = random(shape[-1], 1, 1, 1, seed=1)
            norm.to(dtype)
            x[0, 0, 0] = 0  # a position without length
            buffer = torch.full((2 + shape[0], *shape[1:]), 7.0, dtype=dtype)
            rms_silu(x, norm.gamma.flatten(), buffer[2:], floor=NORM_FLOOR)
            assert (buffer[:2] == 7).all()
            worst = max(worst, relative_error(buffer[2:].float(), F.silu(norm(x)).float()))
        return worst

    def modulate_case(dtype: torch.dtype) -> float:
        worst, norm = 0.0, LayerNorm(48, 1e-6, elementwise_affine=False)
        for frames in (3, 1):
            x, signals = (3 + random(2, 3, 4, 48)).to(dtype), random(2, frames, 6, 48, seed=1).to(dtype)
            shift, scale = signals[:, :, :2, None].unbind(2)
            made = layer_norm_modulate(x, shift, scale, eps=1e-6)
            worst = max(worst, relative_error(made.float(), norm.modulated(x, shift, scale).float()))
        return worst

    def rotary_case(dtype: torch.dtype) -> float:
        worst, layer = 0.0, SelfAttention(48, 2, 1e-6)
        for norm in (layer.norm_q, layer.norm_k):
            norm.weight.data = 1 + 0.1 * random(48, seed=5)
        fused = FusedProjection(layer).to(dtype)
        one = rotary_table((4, 5, 6), 2, 2, 24, torch.device("cpu"))
        other = rotary_table((9, 10, 11), 2, 2, 24, torch.device("cpu"))
        for table in (one, torch.stack([one, other])):
            x = random(2, 3, 4, 48).to(dtype)
            qkv = fused.qkv(x).unflatten(-1, (3, -1))
            made = norm_rotary(qkv, fused.norm, table, num_heads=2, eps=1e-6)
            for mine, plain in zip(made, fused(x, table), strict=False):
                assert mine.shape == plain.shape
                worst = max(worst, relative_error(mine.float(), plain.float()))
        return worst

    cases = {"rms_silu": rms_silu_case, "layer_norm_modulate": modulate_case, "norm_rotary": rotary_case}
    with torch.no_grad():
        return {name: {dtype: case(getattr(torch, dtype)) for dtype in BOUNDS} for name, case in cases.items()}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_equals_the_plain_computation():
    program = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from tests.model.test_triton_kernels import compare; "
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{program}print(json.dumps(compare()))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 3
    for name, by_dtype in errors.items():
        for dtype, error in by_dtype.items():
            assert error <= BOUNDS[dtype], (name, dtype, error)


def test_a_cpu_computes_as_written():
    with torch.no_grad():
        assert not can_fuse(torch.zeros(1))


@pytest.mark.gpu
def test_on_a_gpu_they_equal_the_plain_computation():
    from model.layers import LayerNorm

    x, signals = torch.randn(1, 3, 1560, 1536).cuda(), torch.randn(1, 1, 2, 1536).cuda()
    norm, (shift, scale) = LayerNorm(1536, 1e-6, elementwise_affine=False), signals[:, :, :, None].unbind(2)
    with torch.no_grad():
        fused = norm.modulated(x, shift, scale)
    plain = norm.modulated(x.requires_grad_(), shift, scale)
    assert (fused - plain).abs().max() <= 1e-4
