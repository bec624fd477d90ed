"""Every fast path gives the same result as the plain one."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.transformer import PRESETS, WanTransformer
from pipeline.optimize import (
    CompileMode,
    OptimizeConfig,
    Quantization,
    choose_mode,
    compile_blocks,
    optimize,
    rollout_flops,
)
from pipeline.rollout import RolloutConfig, rollout
from tests.parity import TINY, random, relative_error, tiny_denoiser
from utils.errors import UserError

EMBEDS = random(2, 3, 8, seed=1)


HALF_PRECISION_BOUND = 0.02
"""Relative difference between two clips in bfloat16 whose products are computed in another order."""


@torch.no_grad()
def latents_of(denoiser: Denoiser, frames: int = 12, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    """Return the latents of a rollout."""
    noise, generator = random(2, frames, 4, 4, 6).to(dtype), torch.Generator().manual_seed(0)
    cache = KVCache(denoiser.transformer.config.num_layers)
    embeds = EMBEDS.to(dtype)
    blocks = rollout(denoiser, noise, embeds, cache, RolloutConfig(**options), generator=generator)
    return torch.cat([block.latents for block in blocks], dim=1)


def optimized(sizes=TINY, **options) -> Denoiser:
    denoiser = tiny_denoiser(sizes)
    optimize(denoiser.transformer, OptimizeConfig(**options))
    return denoiser


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 7, "sink": 1}])
def test_one_product_for_q_k_and_v_changes_nothing(options):
    assert relative_error(latents_of(optimized(), **options), latents_of(tiny_denoiser(), **options)) <= 1e-5


def test_a_fused_model_saves_the_names_and_values_it_was_loaded_with():
    plain, fused = tiny_denoiser().state_dict(), optimized().state_dict()
    assert fused.keys() == plain.keys()
    assert all(torch.equal(fused[name], plain[name]) for name in plain)


@pytest.fixture
def inductor(tmp_path, monkeypatch) -> None:
    """An empty folder for compiled code, with only the headers of the C++ compiler, which take half of the time."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compile(torch.sin)(torch.ones(64))


def test_compiled_it_gives_the_same_and_is_not_compiled_again_after_the_first_clip(inductor):
    from torch._dynamo.utils import counters

    sizes = replace(TINY, num_layers=1)
    compiled, options = optimized(sizes, compile=CompileMode.default), {"window": 6}
    expected = latents_of(tiny_denoiser(sizes), frames=12, **options)
    torch._dynamo.reset()
    counters.clear()
    assert relative_error(latents_of(compiled, frames=12, **options), expected) <= 1e-5
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 6 and not counters["graph_break"]
    latents_of(compiled, frames=12, **options)
    latents_of(compiled, frames=36, **options)
    assert counters["stats"]["unique_graphs"] == graphs


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "clips", "triton", "mode"),
    [
        (CUDA, math.inf, True, CompileMode.default),
        (CUDA, 946, True, CompileMode.default),
        (CUDA, 3, True, CompileMode.off),
        (CUDA, math.inf, False, CompileMode.off),
        (torch.device("cpu"), math.inf, True, CompileMode.off),
    ],
)
def test_it_is_compiled_if_that_pays_and_one_line_says_so(monkeypatch, device, clips, triton, mode):
    """A clip of the 1.3B model at 480x832 takes 2.4 s on an H200. Compiling saves 0.3 s of it and costs 30 s."""
    monkeypatch.setattr("pipeline.optimize.find_spec", lambda name: name if triton else None)
    with torch.device("meta"):
        wan = WanTransformer(PRESETS["wan2.1-t2v-1.3b"])
    one = rollout_flops(wan, RolloutConfig(), frames=21, tokens=1560)
    assert one / 430e12 == pytest.approx(2.4, rel=0.1)
    chosen, reason = choose_mode(device, one * clips)
    assert chosen is mode and reason and "\n" not in reason


def test_auto_compiles_nothing_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr("pipeline.optimize.compile_blocks", lambda *_: pytest.fail("it was compiled"))
    caplog.set_level("INFO")
    optimized()
    assert [record.message for record in caplog.records] == [
        "optimize.compile=auto: off, compiling gains little on cpu"
    ]


@torch.no_grad()
def test_one_graph_serves_all_layers():
    """Eight layers need as many graphs as two layers. Later chunks and another clip need no new graph."""
    from torch._dynamo.utils import counters

    made = []
    for layers in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        denoiser = optimized(replace(TINY, num_layers=layers))
        compile_blocks(denoiser.transformer, CompileMode.default, backend="eager")
        latents_of(denoiser, frames=12, window=6)
        graphs = counters["stats"]["unique_graphs"]
        latents_of(denoiser, frames=24, window=6)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
        made.append(graphs)
    assert made[0] == made[1] <= 6


def test_fused_products_round_differently_in_half_precision_within_the_stated_bound():
    """A streamed generator, whose products are not fused, makes almost the same clip as a resident one."""
    plain, fused = (denoiser.bfloat16() for denoiser in (tiny_denoiser(), optimized()))
    clips = [latents_of(denoiser, dtype=torch.bfloat16).float() for denoiser in (plain, fused)]
    assert relative_error(*clips) <= HALF_PRECISION_BOUND


@pytest.mark.parametrize(("kind", "tolerance"), [(Quantization.int8, 0.02), (Quantization.int8_dynamic, 0.05)])
def test_8_bit_products_are_close_layer_by_layer(kind, tolerance):
    pytest.importorskip("torchao")
    sizes = replace(TINY, dim=128, ffn_dim=256)
    plain, quantized = optimized(sizes), optimized(sizes, quantize=kind)
    x = random(1, 64, 128)
    for name, layer in plain.transformer.blocks.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.in_features == 128:
            expected = layer(x)
            error = (quantized.transformer.blocks.get_submodule(name)(x) - expected).norm() / expected.norm()
            assert 0 < error <= tolerance, (name, error)


def test_rounded_products_are_close_layer_by_layer_and_in_a_clip():
    sizes = replace(TINY, dim=128, ffn_dim=256)
    plain, rounded = optimized(sizes), optimized(sizes, quantize=Quantization.fp8_rounded)
    x, changed = random(1, 64, 128), 0
    for name, layer in plain.transformer.blocks.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.in_features == 128:
            changed += 1
            assert 0 < relative_error(rounded.transformer.blocks.get_submodule(name)(x), layer(x)) <= 0.05, name
    assert changed == 2 * 7  # q, k and v of self-attention are one layer
    assert 0 < relative_error(latents_of(rounded), latents_of(plain)) <= 0.1


def test_8_bit_floats_are_refused_without_a_gpu_that_has_them():
    with pytest.raises(UserError, match=r"quantize=fp8 needs an NVIDIA GPU .*, not cpu"):
        optimized(quantize=Quantization.fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [CompileMode.default, CompileMode.cudagraphs])
def test_cuda_graphs_give_the_same(mode):
    denoiser = optimized(compile=mode)
    denoiser.to("cuda")
    noise, embeds, cpu = random(2, 12, 4, 4, 6), EMBEDS, tiny_denoiser()
    expected = torch.cat(
        [b.latents for b in rollout(cpu, noise, embeds, KVCache(2), RolloutConfig(denoising_steps=[1000.0]))], 1
    )
    for _ in range(3):
        blocks = rollout(denoiser, noise.cuda(), embeds.cuda(), KVCache(2), RolloutConfig(denoising_steps=[1000.0]))
        assert relative_error(torch.cat([block.latents for block in blocks], 1).cpu(), expected) <= 1e-3
