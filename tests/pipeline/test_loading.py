"""Parts load as configured, streamed or resident, with or without a LoRA. Their hash tells them apart."""

from dataclasses import replace

import pytest
import torch

from model.attention import AttentionBackend
from model.weights import load_state_dict, weights_hash
from model.weights.lora import LoRA, LowRank, save_lora
from pipeline.config import DenoiserConfig, PipelineConfig, Sampler, TextConfig
from pipeline.loading import generator_hash, load_prompt_cache, load_text_encoder, load_transformer, needs_text_encoder
from pipeline.text_to_video import load_pipeline
from tests.shapes_parts import SIZES
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
PROMPTS = ["a red circle", ""]


@pytest.fixture
def with_lora(release, tmp_path) -> DenoiserConfig:
    """Give the configuration of the generator with a LoRA in its first block."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2)))
    save_lora(tmp_path / "lora", LoRA({"blocks.0.self_attn.q": LowRank(down, up, 0.5)}))
    return replace(release.config().generator, lora=str(tmp_path / "lora"), lora_scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_transformer_computes_what_a_resident_one_does(with_lora, dtype):
    noise, timesteps = torch.randn(1, 3, SIZES.in_dim, 4, 4).to(dtype), torch.full((1, 3), 700.0)
    embeds = torch.randn(1, 16, 16).to(dtype)
    results = []
    for streamed in (False, True):
        config = with_lora if dtype == torch.float32 else replace(with_lora, lora=None)  # a LoRA is rounded as stored
        model = load_transformer(config, device="cpu", dtype=dtype, streamed=streamed).eval()
        with torch.no_grad():
            results.append(model(noise, timesteps, embeds))
    assert results[0].dtype == dtype
    assert torch.equal(*results)


@torch.no_grad()
def test_a_streamed_text_encoder_computes_what_a_resident_one_does(release):
    config = release.config().text_encoder
    resident, streamed = (load_text_encoder(config, streamed=streamed, **CPU) for streamed in (False, True))
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert torch.equal(streamed.encode(PROMPTS), resident.encode(PROMPTS))
    half = load_text_encoder(config, device="cpu", dtype=torch.bfloat16, streamed=True)
    whole = load_text_encoder(config, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(half.encode(PROMPTS), whole.encode(PROMPTS))


def test_the_hash_is_that_of_the_stored_weights_and_follows_ema_and_lora(release, with_lora, tmp_path):
    plain = replace(with_lora, lora=None)
    assert generator_hash(plain) == weights_hash(release.folder / "generator")
    parts = {"generator": "generator", "generator_ema": "student"}
    torch.save({name: load_state_dict(release.folder / part) for name, part in parts.items()}, tmp_path / "both.pt")
    both = replace(plain, weights=str(tmp_path / "both.pt"))
    assert generator_hash(both, use_ema=False) == generator_hash(plain)
    assert generator_hash(both, use_ema=True) == weights_hash(release.folder / "student")
    hashes = {generator_hash(config) for config in (plain, with_lora, replace(with_lora, lora_scale=1.0))}
    assert len(hashes) == 3
    assert generator_hash(with_lora).startswith(f"{generator_hash(plain)}+0.5*")


def test_guided_samplers_embed_the_negative_prompt_too():
    config = PipelineConfig()
    assert config.prompts_to_embed(PROMPTS) == PROMPTS
    config.sampler = Sampler.many_step
    config.sampling.negative_prompt = "blurry"
    assert config.prompts_to_embed(PROMPTS) == [*PROMPTS, "blurry"]


def test_no_text_encoder_is_needed_once_every_prompt_is_on_disk(release, tmp_path):
    config = release.config(f"text_encoder.cache={tmp_path / 'prompts'}")
    assert needs_text_encoder(config, PROMPTS, torch.float32)
    load_prompt_cache(config.text_encoder, **CPU).prepare(PROMPTS)
    assert not needs_text_encoder(config, PROMPTS, torch.float32)
    assert needs_text_encoder(config, [*PROMPTS, "another"], torch.float32)
    assert needs_text_encoder(config, PROMPTS, torch.bfloat16)
    config.sampler = Sampler.many_step
    config.sampling.negative_prompt = "blurry"
    assert needs_text_encoder(config, PROMPTS, torch.float32)


def test_no_cache_folder_keeps_nothing(release, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = release.config().text_encoder.weights
    load_prompt_cache(TextConfig(weights, None, cache=None), **CPU).prepare(PROMPTS)
    assert list(tmp_path.iterdir()) == []
    load_prompt_cache(TextConfig(weights, None), **CPU).prepare(PROMPTS)
    assert len(list((tmp_path / ".cache" / "self-forcing" / "prompts").glob("*.safetensors"))) == len(PROMPTS)


def test_an_attention_kernel_that_cannot_run_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("pipeline.text_to_video.load_prompt_cache", lambda *_, **__: pytest.fail("weights were read"))
    config = PipelineConfig(generator=DenoiserConfig(weights="somewhere", attention=AttentionBackend.flash))
    with pytest.raises(UserError, match="attention kernel 'flash' needs a CUDA device") as error:
        load_pipeline(config, device=torch.device("cpu"), dtype=torch.float32)
    assert "\n" not in str(error.value)
