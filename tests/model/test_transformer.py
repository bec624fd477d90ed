"""The transformer equals Wan's at any size, and its three uses agree."""

from dataclasses import replace

import pytest
import torch

from model.attention import BlockMask, block_causal_mask
from model.kv_cache import KVCache
from model.transformer import WanConfig, WanTransformer
from model.weights import wan_to_diffusers
from tests.parity import TINY, gradients, random, relative_error, tiny_denoiser


def inputs(batch=2, frames=6, height=4, width=6, tokens=5):
    """Return latents, a timestep for each frame, and embeddings."""
    timesteps = torch.linspace(1000, 30, batch * frames).view(batch, frames)
    return random(batch, frames, 4, height, width), timesteps, random(batch, tokens, 8, seed=1)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "frames", "height", "width"), [(1, 3, 4, 6), (3, 5, 8, 2), (2, 1, 6, 6)])
@pytest.mark.parametrize("heads", [1, 2])
def test_it_equals_wan_in_diffusers(batch, frames, height, width, heads):
    from diffusers import WanTransformer3DModel

    config = replace(TINY, num_heads=heads)
    ours = tiny_denoiser(config).transformer
    theirs = WanTransformer3DModel(
        patch_size=tuple(config.patch_size),
        num_attention_heads=heads,
        attention_head_dim=config.dim // heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )
    theirs.load_state_dict(wan_to_diffusers(ours.state_dict()))
    latents, _, embeds = inputs(batch, frames, height, width)
    timesteps = torch.linspace(937.5, 20, batch)
    expected = theirs(latents.transpose(1, 2), timesteps, embeds, return_dict=False)[0].transpose(1, 2)
    assert relative_error(ours(latents, timesteps[:, None].expand(-1, frames), embeds), expected) <= 1e-5


@torch.no_grad()
def test_every_sample_is_alone_in_its_batch():
    transformer = tiny_denoiser().transformer
    batch = inputs(batch=3)
    together = transformer(*batch)
    for index in range(3):
        alone = transformer(*(part[index : index + 1] for part in batch))
        assert relative_error(together[index : index + 1], alone) <= 1e-5


@torch.no_grad()
def test_a_frames_timestep_modulates_that_frame_alone():
    """With one layer and a mask that isolates frames, no other input can carry the timestep."""
    transformer = tiny_denoiser(replace(TINY, num_layers=1)).transformer
    latents, timesteps, embeds = inputs()
    mask = BlockMask(tuple(((f, f + 1), ((f, f + 1),)) for f in range(6)), tuple(range(6)))
    before = transformer(latents, timesteps, embeds, block_mask=mask)
    timesteps[:, 2] += 100
    changed = (transformer(latents, timesteps, embeds, block_mask=mask) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]


@torch.no_grad()
def test_short_prompts_are_padded_with_zeros_and_the_padding_is_attended_to():
    transformer = tiny_denoiser().transformer
    latents, timesteps, embeds = inputs(tokens=3)
    padded = torch.cat([embeds, torch.zeros(2, 2, 8)], dim=1)
    short = transformer(latents, timesteps, embeds)
    assert torch.equal(short, transformer(latents, timesteps, padded))
    without = tiny_denoiser(replace(TINY, text_len=3)).transformer(latents, timesteps, embeds)
    assert relative_error(without, short) > 1e-3


@torch.no_grad()
def test_folding_padded_text_changes_nothing():
    """With a cache a few padded keys replace all of them. Without a cache all padded keys are computed."""
    transformer = tiny_denoiser(replace(TINY, text_len=200)).transformer
    latents, timesteps, _ = inputs(batch=3)
    embeds = torch.zeros(3, 150, 8)
    for sample, used in enumerate((0, 7, 40)):
        embeds[sample, :used] = random(used, 8, seed=sample)
    cache = KVCache(2)
    folded = transformer(latents, timesteps, embeds, cache=cache)
    assert cache.text(embeds, list)[0].k.shape[1] == 48
    assert relative_error(folded, transformer(latents, timesteps, embeds)) <= 1e-5


@torch.no_grad()
def test_one_timestep_serves_all_frames():
    transformer = tiny_denoiser().transformer
    latents, _, embeds = inputs()
    for batch in (1, 2):
        one = torch.full((batch, 1), 300.0)
        shared = transformer(latents[:batch], one, embeds[:batch])
        assert relative_error(shared, transformer(latents[:batch], one.expand(-1, 6), embeds[:batch])) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("start", [21, 10**6])
def test_whole_clips_look_the_same_at_any_start_frame(start):
    transformer = tiny_denoiser().transformer
    assert relative_error(transformer(*inputs(), start_frame=start), transformer(*inputs())) <= 1e-5


@torch.no_grad()
def test_a_mask_without_limits_is_bidirectional():
    transformer = tiny_denoiser().transformer
    whole = block_causal_mask(6, 6)
    assert relative_error(transformer(*inputs(), block_mask=whole), transformer(*inputs())) <= 1e-6


@pytest.mark.parametrize("mask", [None, block_causal_mask(6, 3, window=4, sink=1)])
def test_checkpointing_changes_no_gradient(mask):
    denoiser = tiny_denoiser()
    taken = []
    for checkpointing in (False, True):
        denoiser.transformer.gradient_checkpointing = checkpointing
        denoiser.transformer(*inputs(), block_mask=mask).square().mean().backward()
        taken.append(gradients(denoiser))
    assert taken[0].keys() == taken[1].keys() == dict(denoiser.named_parameters()).keys()
    assert all(torch.equal(taken[0][name], taken[1][name]) for name in taken[0])


def test_training_from_nothing_starts_at_zero_and_can_leave_it():
    transformer = WanTransformer(TINY)
    transformer.reset_parameters(torch.Generator().manual_seed(0))
    output = transformer(*inputs())
    assert not output.any()
    (output - 1).square().mean().backward()
    assert transformer.head.head.weight.grad.any()
    again = WanTransformer(TINY)
    again.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128])
@torch.no_grad()
def test_any_head_dim_runs(head_dim):
    config = WanConfig(dim=2 * head_dim, num_heads=2, ffn_dim=32, num_layers=1, text_dim=8, text_len=5, freq_dim=16)
    latents = random(1, 2, 16, 4, 4)
    flow = tiny_denoiser(config).transformer(latents, torch.full((1, 2), 500.0), random(1, 5, 8))
    assert flow.shape == latents.shape and flow.isfinite().all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"latents": random(2, 6, 3, 4, 6)}, "have 3 channels, not 4"),
        ({"latents": random(2, 6, 4, 5, 6)}, "do not divide into patches of 2x2"),
        ({"prompt_embeds": random(2, 6, 8)}, "do not fit text_len=5, text_dim=8"),
        ({"prompt_embeds": random(2, 5, 9)}, "do not fit text_len=5, text_dim=8"),
        ({"block_mask": block_causal_mask(3, 3)}, "block_mask is for 3 frames, but latents have 6"),
        ({"timesteps": torch.zeros(2, 3)}, "have another number of frames"),
        ({"cache": KVCache(2), "chunk_frames": (3, 2)}, r"chunk_frames=\[3, 2\] do not add up to the 6 frames"),
        ({"block_mask": block_causal_mask(6, 3), "cache": KVCache(2)}, "not both"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, line):
    arguments = dict(zip(("latents", "timesteps", "prompt_embeds"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=line):
        tiny_denoiser().transformer(**arguments)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_heads": 3}, "dim=32 is not an even multiple of num_heads=3"),
        ({"patch_size": [2, 2, 2]}, "patch_size="),
        ({"freq_dim": 15}, "freq_dim=15 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, line):
    with pytest.raises(ValueError, match=line):
        replace(TINY, **change)
