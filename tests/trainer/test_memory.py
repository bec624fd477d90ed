"""A training rollout holds the cache, the activations of one chunk, and the inputs of checkpointed blocks."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.kv_cache import KVCache
from pipeline.rollout import ChunkInput, RolloutConfig, rollout
from pipeline.states import SwitchStyle
from pipeline.steps import GradientSteps
from tests.shapes_parts import SIZES as TINY
from tests.shapes_parts import tiny_transformer

SIZES = replace(TINY, in_dim=16, out_dim=16)  # latents are small, as in a real model, if compared with hidden states
FRAMES, SIDE = 3, 12
TOKENS = FRAMES * (SIDE // 2) ** 2
STATE = TOKENS * SIZES.dim * 4
"""Bytes of the hidden states of a chunk, and of its keys or values in one layer."""
CACHE = 2 * SIZES.num_layers * STATE
"""Bytes of a chunk's keys and values."""
LATENTS = FRAMES * SIZES.in_dim * SIDE**2 * 4
"""Bytes of a chunk's latents."""
ALL = 1000
"""More frames than any rollout in this file has."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of existing tensors that were made inside it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._free(key)), size
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)[1]


@pytest.fixture
def denoiser() -> Denoiser:
    transformer = tiny_transformer(0, SIZES)
    transformer.gradient_checkpointing = True
    return Denoiser(transformer, FlowMatching(5.0))


def bytes_of(
    denoiser: Denoiser,
    chunks: int,
    grad_start_frame: int | None,
    config: RolloutConfig,
    keep: list | None = None,
    **options,
) -> tuple[int, int]:
    """Return the peak bytes of the rollout alone and with its backward pass. Its gradients are added to `keep`."""
    noise = torch.randn(1, chunks * FRAMES, SIZES.in_dim, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    embeds = torch.zeros(1, SIZES.text_len, SIZES.text_dim)
    cache = KVCache(SIZES.num_layers, append_only=True)
    steps = [len(config.denoising_steps) - 1] * chunks
    with Allocations() as memory:
        blocks = rollout(
            denoiser, noise, embeds, cache, config, exit_steps=steps, grad_start_frame=grad_start_frame,
            generator=torch.Generator().manual_seed(1), **options,
        )  # fmt: skip
        video = torch.cat([block.latents for block in blocks], dim=1)
        rolled_out = memory.peak
        if grad_start_frame is not None:
            video.square().mean().backward()
    if keep is not None:
        keep.append({name: parameter.grad for name, parameter in denoiser.named_parameters()})
    denoiser.zero_grad()
    return rolled_out, memory.peak


def growth(
    denoiser: Denoiser, frames_with_gradient: int | None, config: RolloutConfig, **options
) -> tuple[float, float]:
    """Return the bytes that one more chunk costs, in the rollout and with its backward pass."""
    few, many = 3, 6
    measured = []
    for chunks in (few, many):
        start = None if frames_with_gradient is None else max(0, chunks * FRAMES - frames_with_gradient)
        measured.append(bytes_of(denoiser, chunks, start, config, **options))
    return tuple((later - earlier) / (many - few) for earlier, later in zip(*measured, strict=True))


ROLLING = RolloutConfig(denoising_steps=[1000, 500], window=6)


@pytest.mark.parametrize("frames_with_gradient", [None, FRAMES], ids=["none", "last chunk"])
def test_chunks_without_gradient_cost_their_place_in_the_cache_and_their_latents(denoiser, frames_with_gradient):
    rolled_out, trained = growth(denoiser, frames_with_gradient, ROLLING)
    assert rolled_out <= CACHE + 4 * LATENTS
    assert trained <= CACHE + 6 * LATENTS  # their gradient too


def test_checkpointed_chunks_with_gradient_cost_the_inputs_of_their_blocks_besides(denoiser):
    inputs = SIZES.num_layers * STATE
    assert growth(denoiser, ALL, ROLLING)[1] <= CACHE + inputs + 8 * LATENTS
    denoiser.transformer.gradient_checkpointing = False
    assert growth(denoiser, ALL, ROLLING)[1] > 3 * (CACHE + inputs + 8 * LATENTS)  # the measure sees activations


@pytest.mark.parametrize(
    ("options", "passes", "caches"),
    [({"gradient_steps": GradientSteps.all}, 2, 1), ({"detach_cache": False}, 2, 2)],
    ids=["all steps", "cache not detached"],
)
def test_more_passes_with_gradient_cost_their_inputs_too_and_a_cache_with_graph_costs_its_keys_again(
    denoiser, options, passes, caches
):
    inputs = SIZES.num_layers * STATE
    grown = growth(denoiser, ALL, ROLLING, **options)[1]
    assert growth(denoiser, ALL, ROLLING)[1] + inputs / 2 < grown <= caches * CACHE + passes * (inputs + 8 * LATENTS)


@pytest.mark.parametrize("style", [SwitchStyle.keep, SwitchStyle.recache])
@pytest.mark.parametrize("learns", [False, True], ids=["no backward pass", "backward pass"])
def test_a_cache_refers_to_no_graph_after_its_rollout_and_is_freed(denoiser, style, learns):
    """Also after checkpointed passes were computed again. Python's collector of cycles is off."""
    cache, embeds = KVCache(SIZES.num_layers, append_only=True), torch.zeros(1, SIZES.text_len, SIZES.text_dim)
    noise = torch.randn(4, 1, FRAMES, SIZES.in_dim, SIDE, SIDE)
    chunks = [noise[0], noise[1], ChunkInput(noise[2], prompt_embeds=embeds.clone(), style=style), noise[3]]
    options = {"grad_start_frame": 0, "detach_cache": False}
    video = [block.latents for block in rollout(denoiser, chunks, embeds, cache, ROLLING, **options)]
    assert video[-1].requires_grad
    if learns:
        torch.cat(video).sum().backward()
    layer = weakref.ref(cache.layers[0])
    assert all(frame is None for frame in layer().k.live.values())
    gc.disable()
    del cache, video
    gc.enable()
    assert layer() is None


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 7, "sink": 1}], ids=["all", "rolling", "sink"])
def test_checkpointing_changes_no_gradient_whatever_the_cache_has_dropped(denoiser, options):
    config = RolloutConfig(denoising_steps=[1000, 500], **options)
    gradients = []
    for checkpointing in (True, False):
        denoiser.transformer.gradient_checkpointing = checkpointing
        bytes_of(denoiser, 4, 0, config, keep=gradients)
    first, second = gradients
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())
    assert first.keys() == dict(denoiser.named_parameters()).keys()
