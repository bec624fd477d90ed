"""At the published sizes, every key and shape equals that of the other libraries. Tensors are on the meta device."""

from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import UMT5Config, UMT5EncoderModel

from model.text_encoder_files import _build_umt5, _infer_config
from model.transformer import PRESETS, WanTransformer
from model.weights import WAN_T5_TO_TRANSFORMERS, check_fit, rename_keys, wan_to_diffusers
from model.weights.transformer_config import fitting_preset, infer_transformer_sizes, read_transformer_config
from tests.fake_release import original_vae_name

# (layers, width, feed-forward width, heads, billions of parameters) as Wan-AI publishes them
PUBLISHED = {"wan2.1-t2v-1.3b": (30, 1536, 8960, 12, 1.42), "wan2.1-t2v-14b": (40, 5120, 13824, 40, 14.29)}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_transformer_tensor_has_its_place_in_diffusers_and_none_is_left_over(preset):
    layers, dim, ffn_dim, heads, billions = PUBLISHED[preset]
    theirs = on_meta(
        lambda: WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=dim // heads, ffn_dim=ffn_dim
        )
    )
    ours = on_meta(lambda: WanTransformer(PRESETS[preset])).state_dict()
    assert shapes(wan_to_diffusers(ours)) == shapes(theirs.state_dict())
    assert shapes(convert_wan_transformer_to_diffusers(dict(ours))) == shapes(theirs.state_dict())
    assert sum(tensor.numel() for tensor in ours.values()) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_sizes_and_heads_of_the_published_models_follow_from_their_shapes(preset, tmp_path):
    state = on_meta(lambda: WanTransformer(PRESETS[preset])).state_dict()
    assert infer_transformer_sizes(state).items() <= asdict(PRESETS[preset]).items()
    assert fitting_preset(state) == preset
    assert read_transformer_config(tmp_path / "weights.pt", state, preset="shapes") == PRESETS[preset]


def umt5_xxl_names():
    """Return the name and the shape of every tensor of models_t5_umt5-xxl-enc-bf16.pth."""
    dim, ffn, heads, layers = 4096, 10240, 64, 24
    yield "token_embedding.weight", (256384, dim)
    yield "norm.weight", (dim,)
    for block in (f"blocks.{layer}" for layer in range(layers)):
        yield f"{block}.norm1.weight", (dim,)
        yield f"{block}.norm2.weight", (dim,)
        yield f"{block}.pos_embedding.embedding.weight", (32, heads)
        yield from ((f"{block}.attn.{name}.weight", (dim, dim)) for name in "qkvo")
        yield from ((f"{block}.ffn.{name}.weight", (ffn, dim)) for name in ("gate.0", "fc1"))
        yield f"{block}.ffn.fc2.weight", (dim, ffn)


def test_every_umt5_xxl_tensor_has_its_place_in_transformers_and_none_is_left_over():
    state = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in umt5_xxl_names()}
    renamed = rename_keys(state, WAN_T5_TO_TRANSFORMERS)
    published = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, dropout_rate=0.0
    )
    theirs = shapes(on_meta(lambda: UMT5EncoderModel(published)).state_dict())
    assert theirs.pop("encoder.embed_tokens.weight") == (256384, 4096)  # tied to shared.weight
    assert shapes(renamed) == theirs

    inferred = _infer_config(renamed, "umt5-xxl")
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    assert {name: getattr(inferred, name) for name in sizes} == {name: getattr(published, name) for name in sizes}
    model = _build_umt5(inferred, renamed, source="umt5-xxl", dtype=None)
    assert all(parameter.is_meta and parameter.dtype is torch.bfloat16 for parameter in model.parameters())


def test_every_vae_tensor_has_its_place_in_diffusers_and_none_is_left_over():
    vae = on_meta(AutoencoderKLWan)
    theirs = vae.state_dict()
    original = {original_vae_name(name): tensor for name, tensor in theirs.items()}
    assert len(original) == len(theirs) == 194
    assert {"conv1.weight", "encoder.conv1.weight", "decoder.middle.1.to_qkv.weight"} <= original.keys()
    assert not any("resnets" in name or "up_blocks" in name for name in original)
    converted = convert_wan_vae_to_diffusers(original)
    assert shapes(converted) == shapes(theirs)
    check_fit(vae, converted, source="Wan2.1_VAE.pth")
