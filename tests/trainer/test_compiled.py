"""Compiled blocks train like plain ones, with one graph for each kind of pass. Sharding gathers one block at a time."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from model.denoiser import Denoiser
from model.kv_cache import KVCache
from pipeline.optimize import compile_blocks
from tests.parity import TINY, random, relative_error, tiny_denoiser
from trainer import parallelize
from trainer.parallelize import ParallelConfig, Parallelism, whole
from utils.distributed import Ranks, shutdown_distributed

KINDS_OF_PASS = 6
"""A first chunk, a later chunk, a context pass, a later chunk with gradient, a whole clip, and one more allowed."""


@pytest.fixture(autouse=True)
def alone():
    yield
    shutdown_distributed()
    torch._dynamo.reset()


def gradients(denoiser: Denoiser) -> list[torch.Tensor]:
    """Return the gradients of a rollout's last chunk and of a whole clip."""
    denoiser.zero_grad()
    cache = KVCache(denoiser.transformer.config.num_layers, append_only=True)
    latents, timesteps, embeds = random(1, 3, 4, 4, 6), torch.full((1, 3), 500.0), random(1, 5, 8, seed=1)
    with torch.no_grad():
        for start in (0, 3, 6):
            denoiser(latents, timesteps, embeds, cache=cache, start_frame=start)
            denoiser(latents, timesteps, embeds, cache=cache, start_frame=start, output_frames=0)
    denoiser(latents, timesteps, embeds, cache=cache, start_frame=9).x0.float().square().mean().backward()
    denoiser(latents, timesteps, embeds).x0.float().square().mean().backward()
    return [whole(parameter.grad).clone() for parameter in denoiser.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_blocks_are_compiled_in_one_graph_a_kind_of_pass(monkeypatch, checkpointing):
    from torch._dynamo.utils import counters

    monkeypatch.setattr("trainer.parallelize.compile_blocks", partial(compile_blocks, backend="eager"))
    sizes = replace(TINY, num_layers=4)
    plain, compiled = tiny_denoiser(sizes), tiny_denoiser(sizes)
    counters.clear()
    for denoiser, compile in ((plain, False), (compiled, True)):
        denoiser.transformer.gradient_checkpointing = checkpointing
        config = ParallelConfig(precision="bfloat16", compile=compile)
        Parallelism(config, torch.device("cpu"), Ranks()).trained(denoiser)
    pairs = list(zip(gradients(compiled), gradients(plain), strict=True))
    assert len(pairs) > 60
    assert all(relative_error(mine.float(), other.float()) <= 0.02 for mine, other in pairs)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= KINDS_OF_PASS and not counters["graph_break"]
    gradients(compiled)
    assert counters["stats"]["unique_graphs"] == graphs


def test_sharding_converts_weights_block_by_block(monkeypatch):
    """A process that shares its machine with others never has a whole model in float32 in memory."""
    shard, converted = parallelize.fully_shard, []
    denoiser = tiny_denoiser(replace(TINY, num_layers=4)).bfloat16()
    blocks = list(denoiser.transformer.blocks)

    def watched(module, **options):
        converted.append(sum(block.ffn[0].weight.dtype is torch.float32 for block in blocks))
        return shard(module, **options)

    monkeypatch.setattr(parallelize, "fully_shard", watched)
    parallelism = Parallelism(ParallelConfig(precision="bfloat16"), torch.device("cpu"), Ranks())
    assert parallelism.loading_dtype(torch.float32, merges=False) is None
    assert parallelism.loading_dtype(torch.float32, merges=True) is torch.float32
    parallelism.trained(denoiser)
    assert converted == [1, 1, 2, 2, 3, 3, 4, 4, 4]  # two units a block, then the whole
    assert all(parameter.dtype is torch.float32 for parameter in denoiser.parameters())
