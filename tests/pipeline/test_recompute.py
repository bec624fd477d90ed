"""A rollout that encodes its context again for every chunk, from decoded frames (krea-ai/realtime-video)."""

import gc
from itertools import repeat

import pytest
import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.kv_cache import KVCache
from pipeline.recompute import ContextImages
from pipeline.request import StreamRequest
from pipeline.rollout import ChunkInput, RolloutConfig, rollout
from pipeline.states import SwitchStyle
from pipeline.stream import Stream
from pipeline.text_to_video import TextToVideo
from tests.parity import random, relative_error
from tests.shapes_parts import SIZES, tiny_codec, tiny_transformer

STEPS = [1000.0, 500.0]
EMBEDS, OTHER = (random(1, SIZES.text_len, SIZES.text_dim, seed=seed) for seed in (1, 2))
CHUNK = (1, 3, SIZES.in_dim, 4, 4)


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(tiny_transformer(0), FlowMatching(5.0))


def rules(**options) -> RolloutConfig:
    return RolloutConfig(denoising_steps=STEPS, window=6, **options)


def fresh_chunk(
    denoiser: Denoiser, codec, finished: Tensor, noise: Tensor, generator: torch.Generator, window: int
) -> Tensor:
    """Return the next chunk, made with a new cache. The context comes from the decoded frames of all earlier chunks."""
    frames = window - 3
    context = finished[:, -frames:]
    if finished.shape[1] > frames:
        first = codec.decode(finished)[:, -(1 + (frames - 1) * codec.temporal_scale)]
        context = torch.cat([codec.encode(first[:, None]), context[:, 1:]], dim=1)
    config, cache = RolloutConfig(denoising_steps=STEPS, window=window), KVCache(SIZES.num_layers)
    (block,) = rollout(denoiser, noise, EMBEDS, cache, config, context_latents=context, generator=generator)
    return block.latents


@pytest.mark.parametrize("window", [6, 9])
def test_every_chunk_is_that_of_a_fresh_cache_built_from_the_same_decoded_frames(denoiser, codec, window):
    noise = [random(*CHUNK, seed=seed) for seed in range(6)]
    config = RolloutConfig(denoising_steps=STEPS, window=window, recompute=True)
    generator, chunks = torch.Generator().manual_seed(1), []
    options = {"generator": generator, "images": ContextImages(codec, window)}
    blocks = rollout(denoiser, iter(noise), EMBEDS, KVCache(SIZES.num_layers), config, **options)
    for index in range(6):
        state = torch.Generator()
        state.set_state(generator.get_state())
        chunks.append(next(blocks).latents)
        if index:
            finished = torch.cat(chunks[:index], dim=1)
            expected = fresh_chunk(denoiser, codec, finished, noise[index], state, window)
            assert relative_error(chunks[index], expected) <= 1e-5, index
    config, drawn = RolloutConfig(denoising_steps=STEPS, window=window), torch.Generator().manual_seed(1)
    kept = rollout(denoiser, iter(noise), EMBEDS, KVCache(SIZES.num_layers), config, generator=drawn)
    assert relative_error([block.latents for block in kept][5], chunks[5]) > 1e-2  # the mode does something


def living_bytes() -> int:
    """Return the bytes of all existing tensors. Tensors of the compiler, which other tests leave, have no bytes."""
    gc.collect()
    real = (Tensor, torch.nn.Parameter)
    storages = (thing.untyped_storage() for thing in gc.get_objects() if type(thing) in real)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_two_hundred_chunks_take_no_more_memory_than_twenty(denoiser, codec):
    """The bytes of all existing tensors are the same after chunk 21, 111 and 200."""
    images, cache = ContextImages(codec, 6), KVCache(SIZES.num_layers)
    noise = repeat(random(*CHUNK, seed=3), 200)
    sizes = []
    config = RolloutConfig(denoising_steps=STEPS[:1], window=6, recompute=True)
    blocks = rollout(denoiser, noise, EMBEDS, cache, config, images=images)
    for index, _ in enumerate(blocks):
        if index in (20, 110, 199):
            sizes.append(living_bytes())
    assert len(sizes) == 3 and max(sizes) == min(sizes)


def test_a_new_prompt_reaches_the_context_and_a_cut_forgets_it(denoiser, codec):
    def roll(style: SwitchStyle | None) -> list[Tensor]:
        inputs = [ChunkInput(random(*CHUNK, seed=seed)) for seed in range(4)]
        if style is not None:
            inputs[2] = ChunkInput(inputs[2].latents, prompt_embeds=OTHER, style=style)
        options = {"generator": torch.Generator().manual_seed(5), "images": ContextImages(codec, 6)}
        blocks = rollout(denoiser, inputs, EMBEDS, KVCache(SIZES.num_layers), rules(recompute=True), **options)
        return [block.latents for block in blocks]

    kept, switched, cut = roll(None), roll(SwitchStyle.recache), roll(SwitchStyle.cut)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept[:2], switched, cut, strict=False))
    assert relative_error(switched[2], kept[2]) > 1e-3 and relative_error(cut[2], switched[2]) > 1e-3


def test_a_stream_takes_the_mode_from_its_configuration(denoiser, codec):
    class Text:
        def encode(self, prompts):
            return EMBEDS.expand(len(prompts), -1, -1)

    def latents(config: RolloutConfig) -> Tensor:
        pipeline = TextToVideo(denoiser, Text(), codec, config)
        stream = Stream(pipeline, StreamRequest("a", height=16, width=16, num_frames=12))
        return torch.cat([chunk.latents for chunk in stream], dim=1)

    plain, anew = latents(rules()), latents(rules(recompute=True))
    assert torch.equal(plain[:, :3], anew[:, :3]) and relative_error(anew[:, 9:], plain[:, 9:]) > 1e-3


@pytest.mark.parametrize("options", [{"window": None}, {"window": 6, "sink": 3}])
def test_it_needs_a_window_without_a_sink(options):
    with pytest.raises(ValueError, match="recompute=true needs a window and sink=0"):
        RolloutConfig(recompute=True, **options)
