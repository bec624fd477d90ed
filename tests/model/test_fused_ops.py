"""Fused kernels equal the plain layers, obey the rules of operators, and work in graphs without breaks.

Without a GPU they run in Triton's interpreter (see tests/conftest.py), on tensors of a few tokens.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import fused_ops as fused
from model.fused_block import FusedBlock
from model.kv_cache import CachedText, KVCache
from model.layer_cache import KeyLayout, LayerCache
from model.layers import Block, LayerNorm, split_heads
from model.rope import rotary_table
from pipeline.optimize import CompileMode, Kernels, OptimizeConfig, compile_blocks, optimize
from pipeline.rollout import RolloutConfig, rollout
from tests.parity import TINY, random, relative_error, tiny_denoiser
from utils.errors import UserError

pytest.importorskip("triton", reason="fused kernels need triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Relative to the largest value of the plain layers in float32. In bfloat16 a kernel rounds once."""
CLIP_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Relative to the largest value of the plain blocks' clip of several chunks."""
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(*shape, seed=seed).to(DEVICE, dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(actual.float(), expected.float()) <= BOUNDS[actual.dtype]


def signals(frames: int, dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    """Return shift, scale and gate like those of a block: views [B f 1 C] of one tensor."""
    return list(made(2, frames, 2 * count, 24, seed=9, dtype=dtype)[:, :, :count, None].unbind(2))


@DTYPES
@pytest.mark.parametrize("timesteps", [1, 3])
def test_norm_and_modulation_equal_the_plain_layer(dtype, timesteps):
    x, (shift, scale, _) = made(2, 3, 5, 24, dtype=dtype), signals(timesteps, dtype)
    norm = LayerNorm(24, 1e-6, elementwise_affine=False)
    assert_near(fused.norm_modulated(x, shift, scale, 1e-6), norm.modulated(x.float(), shift.float(), scale.float()))


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
def test_a_residual_and_the_norm_behind_it_equal_the_plain_layers(dtype, gated):
    x, branch, (shift, scale, gate) = (
        made(2, 3, 5, 24, dtype=dtype),
        made(2, 3, 5, 24, seed=1, dtype=dtype),
        signals(3, dtype),
    )
    total, normed = fused.residual_norm(x, branch, gate if gated else None, shift, scale, 1e-6)
    assert_near(total, x.float() + branch.float() * (gate.float() if gated else 1))
    norm = LayerNorm(24, 1e-6, elementwise_affine=False)
    assert_near(normed, norm.modulated(total.float(), shift.float(), scale.float()))


@DTYPES
def test_a_norm_with_weights_of_its_own_is_one_of_offset_0(dtype):
    x, branch = made(2, 3, 5, 24, dtype=dtype), made(2, 3, 5, 24, seed=1, dtype=dtype)
    weight, bias = made(2, 24, seed=2, dtype=dtype)
    total, normed = fused.residual_norm(x, branch, None, bias, weight, 1e-6, offset=0.0)
    assert_near(normed, F.layer_norm(total.float(), (24,), weight.float(), bias.float(), 1e-6))


@DTYPES
@pytest.mark.parametrize("lanes", [1, 2], ids=["one start frame", "a start frame a sample"])
def test_q_k_and_v_are_normed_rotated_and_put_into_their_slots_and_nowhere_else(dtype, lanes):
    heads, head_dim, tokens, frames = 3, 8, 6, 2
    qkv = made(2, frames + 1, tokens, 72, dtype=dtype)[:, 1:]  # a chunk of a longer pass
    norm = made(2, 24, seed=3, dtype=dtype)
    starts = range(lanes)
    tables = [rotary_table((start + 4, start + 5), 2, 3, head_dim, torch.device(DEVICE)) for start in starts]
    rotary = tables[0] if lanes == 1 else torch.stack(tables)
    layout = KeyLayout(2, tokens, heads, head_dim, dtype, torch.device(DEVICE))
    cache = LayerCache.empty(layout, 5, sink=0, fp8=False)
    for buffer in (cache.k.data, cache.v.data):
        buffer.fill_(7)
    index = torch.tensor([4, 1], device=DEVICE)
    q = fused.split_qkv(qkv, norm, rotary, index, cache.k.data, cache.v.data, num_heads=heads, eps=1e-6)
    expected = split_heads(qkv.float(), norm.float(), rotary, num_heads=heads, eps=1e-6)
    for actual, plain in zip((q, cache.k.data[:, index], cache.v.data[:, index]), expected, strict=True):
        assert_near(actual, plain)
    assert all((buffer[:, [0, 2, 3]] == 7).all() for buffer in (cache.k.data, cache.v.data))


def operators() -> list[tuple]:
    """Return every operator with arguments as a model passes them: views, optional parts, a mutated buffer."""
    x, branch, (shift, scale, gate) = made(2, 3, 5, 24), made(2, 3, 5, 24, seed=1), signals(3, torch.float32)
    shift, scale, gate = (signal.squeeze(2) for signal in (shift, scale, gate))
    one = gate[:, :1].expand(-1, 3, -1)
    buffers = [made(2, 4, 5, 3, 8, seed=seed) for seed in (4, 5)]
    qkv, norm, table = made(2, 3, 5, 72), made(2, 24), made(1, 3, 5, 8).expand(2, -1, -1, -1)
    index = torch.tensor([0, 3, 2], device=DEVICE)
    frames, memory, gamma, bias = made(3, 2, 3, 6), made(2, 2, 3, 6, seed=1), made(6), made(6, seed=1)
    return [
        (fused._norm_modulated, (x, shift, scale, 1e-6)),
        (fused._residual_norm, (x, branch, gate, one, scale, 1e-6, 1.0)),
        (fused._residual_norm, (x[:, 1:], branch[:, 1:], None, shift[:, 1:], scale[:, 1:], 1e-6, 0.0)),
        (fused._split_qkv, (qkv, norm, table, index, *buffers, 3, 1e-6)),
        (fused.norm_silu, (frames, bias, gamma, memory, 1e-12)),
        (fused.norm_silu, (frames[:1], None, gamma, memory, 1e-12)),
        (fused.add_shortcut, (frames, bias, frames.flip(0))),
    ]


@pytest.mark.parametrize("case", range(7))
def test_the_operators_keep_the_rules_of_operators(case):
    operator, arguments = operators()[case]
    torch.library.opcheck(operator, arguments)


@torch.no_grad()
def clip(denoiser, dtype: torch.dtype, *, frames: int = 9, **options) -> torch.Tensor:
    """Return the latents of a rollout with one token a frame, as interpreted kernels need a millisecond a token."""
    noise, embeds = made(1, frames, 4, 2, 2, dtype=dtype), made(1, 3, 8, seed=1, dtype=dtype)
    cache = KVCache(denoiser.transformer.config.num_layers)
    config = RolloutConfig(denoising_steps=[1000.0], **options)
    generator = torch.Generator().manual_seed(0)
    blocks = rollout(denoiser, noise, embeds, cache, config, generator=generator)
    return torch.cat([block.latents for block in blocks], dim=1)


def with_kernels(kernels: Kernels, dtype: torch.dtype = torch.float32):
    denoiser = tiny_denoiser(replace(TINY, num_layers=1)).to(DEVICE, dtype)
    optimize(denoiser.transformer, OptimizeConfig(kernels=kernels))
    return denoiser


@DTYPES
@pytest.mark.parametrize("options", [{"window": 6}, {"window": 7, "sink": 1}], ids=str)
def test_a_rollout_with_fused_blocks_equals_one_with_plain_blocks(dtype, options):
    plain, ours = (clip(with_kernels(kernels, dtype), dtype, **options) for kernels in Kernels)
    assert relative_error(ours.float(), plain.float()) <= CLIP_BOUNDS[dtype]


def test_caches_that_keys_cannot_be_written_to_directly_get_them_as_ever(monkeypatch):
    """With a moving sink, with keys in 8 bits, and without a cache, the kernel returns k and v as tensors."""
    plain, ours = with_kernels(Kernels.torch), with_kernels(Kernels.triton)
    monkeypatch.setattr("model.fused_block.FusedBlock._attend_to_cache", None)
    options, bound = {"window": 6, "sink": 1, "relative_positions": True}, CLIP_BOUNDS[torch.float32]
    options["frames_per_chunk"] = 1
    clips = [clip(one, torch.float32, frames=8, **options) for one in (ours, plain)]
    assert relative_error(*clips) <= bound
    arguments = made(1, 2, 4, 2, 4), torch.full((1, 1), 500.0, device=DEVICE), made(1, 3, 8, seed=1)
    with torch.no_grad():
        assert relative_error(ours.transformer(*arguments), plain.transformer(*arguments)) <= bound
        caches = [KVCache(1, fp8=True) for _ in range(2)]
        results = [one.transformer(*arguments, cache=cache) for one, cache in zip((ours, plain), caches, strict=True)]
    assert relative_error(*results) <= 0.02  # a rounding may fall on the other side of an 8-bit step


def test_several_chunks_in_one_pass_see_what_they_see_with_plain_blocks():
    results = []
    for kernels in Kernels:
        transformer, cache = with_kernels(kernels).transformer, KVCache(1, window=4)
        with torch.no_grad():
            for start in (0, 4):
                out = transformer(
                    made(2, 4, 4, 2, 4, seed=start),
                    made(2, 4).abs() * 300,
                    made(2, 3, 8, seed=1),
                    cache=cache,
                    start_frame=start,
                    chunk_frames=[2, 2],
                    output_frames=4 if start else 0,
                )
        results.append(out)
    assert relative_error(*results) <= CLIP_BOUNDS[torch.float32]


def test_fused_blocks_keep_the_names_and_values_of_the_file():
    plain, ours = with_kernels(Kernels.torch).state_dict(), with_kernels(Kernels.triton).state_dict()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_fused_blocks_are_one_graph_without_breaks():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    ours = with_kernels(Kernels.triton)
    compile_blocks(ours.transformer, CompileMode.default, backend="aot_eager")
    compiled = clip(ours, torch.float32, frames=9, window=6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6 and not counters["graph_break"]
    assert relative_error(compiled, clip(with_kernels(Kernels.torch), torch.float32, frames=9, window=6)) <= 1e-5
    clip(ours, torch.float32, frames=12, window=6)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_kernels_that_cannot_run_are_refused_in_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"kernels=triton needs a CUDA device, not cpu; use optimize\.kernels=torch"):
        optimize(tiny_denoiser().transformer, OptimizeConfig(kernels=Kernels.triton))
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton"):
        optimize(tiny_denoiser().transformer, OptimizeConfig(kernels=Kernels.triton))


def test_every_kernel_compiles_for_a_hopper_gpu_that_is_not_here():
    """The interpreter accepts code that the compiler may refuse, so the compiler and the assembler run too."""
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "tests/model/compile_kernels.py")]
    run = subprocess.run(command, env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    made = json.loads(run.stdout)
    assert len(made) == 4 and all(one["code"] > 0 for one in made.values())


class BytesMoved(TorchDispatchMode):
    """Counts the bytes that operations read and write. Views move nothing. Products and attention are not counted."""

    PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [one.alias_info for one in func._schema.returns if one.alias_info is not None]
        viewed = aliases and not any(one.is_write for one in aliases)
        if not viewed and not any(name in str(func) for name in self.PRODUCTS) and "empty" not in str(func):
            read = [x for x in args if isinstance(x, torch.Tensor) and "copy_" not in str(func)]
            read += [args[-1]] if "copy_" in str(func) and isinstance(args[-1], torch.Tensor) else []
            written = out if isinstance(out, tuple) else (out,)
            self.total += sum(x.numel() * x.element_size() for x in [*read, *written] if isinstance(x, torch.Tensor))
        return out


@torch.no_grad()
def passes_of_a_layer(*, fused_kernels: bool, frames: int = 3, tokens: int = 1560, dim: int = 1536) -> float:
    """Return the bytes that a layer of Wan2.1-1.3B moves without products and attention, in passes over a chunk."""
    dtype, heads = torch.bfloat16, 12
    with torch.device("meta"):
        block = Block(dim, 8960, heads, 1e-6).to(dtype)
        block.self_attn.fuse()
        x, modulation = torch.empty(1, frames, tokens, dim, dtype=dtype), torch.empty(1, frames, 6, dim, dtype=dtype)
        text = CachedText(*(torch.empty(1, 512, heads, dim // heads, dtype=dtype) for _ in range(2)), None)
        rotary = torch.empty(frames, tokens, 1, dim // heads // 2, 2)
    block = FusedBlock(block) if fused_kernels else block
    layout = KeyLayout(1, tokens, heads, dim // heads, dtype, torch.device("meta"), static=fused_kernels)
    cache = KVCache(1, window=frames)
    chunk = cache.open(layout, 0, frames)
    with pytest.MonkeyPatch.context() as patch, BytesMoved() as moved:
        patch.setattr("model.attention.run_kernel", lambda backend, q, k, v: torch.empty_like(q))
        block(x, modulation, text, rotary, cache=cache.layers[0], chunks=[chunk])
    return moved.total / (x.numel() * x.element_size())


def test_fused_kernels_move_less_than_half_of_the_bytes_of_a_layer():
    plain, ours = passes_of_a_layer(fused_kernels=False), passes_of_a_layer(fused_kernels=True)
    assert ours <= 50 and ours <= plain / 2, (plain, ours)
