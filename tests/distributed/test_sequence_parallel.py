"""Two processes that share the tokens of one stream give what one gives."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.kv_cache import KVCache
from pipeline.optimize import OptimizeConfig, optimize
from pipeline.rollout import RolloutConfig, rollout
from scripts.endurance.kills import start_ranks, wait
from tests.parity import random, relative_error, tiny_denoiser
from utils.distributed import init_distributed, shutdown_distributed

CASES = [{}, {"window": 6}, {"window": 7, "sink": 1, "relative_positions": True}]


def latents_of(denoiser: Denoiser, options: dict) -> Tensor:
    noise, generator = random(2, 12, 4, 4, 8), torch.Generator().manual_seed(0)
    blocks = rollout(
        denoiser, noise, random(2, 3, 8, seed=1), KVCache(2), RolloutConfig(**options), generator=generator
    )
    return torch.cat([block.latents for block in blocks], dim=1)


def work(folder: Path) -> None:
    """Share a denoiser in each process. Record its difference from a whole one, and the shape of its cache."""
    ranks = init_distributed("cpu")
    whole, shared = tiny_denoiser(), tiny_denoiser()
    optimize(shared.transformer, OptimizeConfig(sequence_parallel=True))
    errors = [relative_error(latents_of(shared, options), latents_of(whole, options)) for options in CASES]
    noise, timesteps = random(1, 3, 4, 4, 8), torch.full((1, 3), 500.0)
    arguments = noise, timesteps, random(1, 3, 8, seed=1)
    errors.append(relative_error(shared(*arguments).x0, whole(*arguments).x0))
    cache, live = KVCache(2), torch.zeros(1, 3, 8, 1, 16)
    with torch.no_grad():
        shared(*arguments, cache=cache)
        cached = cache.extend(0, live, live, 0)[0].shape
        with pytest.raises(ValueError, match="3 tokens a frame are not a multiple of the 2 processes"):
            shared(random(1, 3, 4, 2, 6), *arguments[1:])
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"errors": errors, "cached": list(cached)}))
    shutdown_distributed()


def test_two_processes_give_what_one_gives(tmp_path):
    wait(start_ranks(work, (tmp_path,), 2), timeout=240)
    for rank in range(2):
        noted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(noted["errors"]) == len(CASES) + 1 and max(noted["errors"]) <= 1e-5
        assert noted["cached"] == [1, 24, 1, 16]  # all tokens, half the heads
