"""TinyVAE: agreement with the published network, streaming, frame counts, files."""

import json
import math
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TINY_VAE_PRESETS, TinyVAEConfig
from utils.errors import UserError

SMALL = TinyVAEConfig(
    patch_size=2,
    latent_channels=5,
    encoder_widths=(7, 6, 8),
    decoder_widths=(8, 6, 7),
    encoder_blocks=1,
    decoder_blocks=2,
    spatial_strides=(2, 1),
    temporal_strides=(2, 2),
    first_frame_alone=True,
)


def make(config: TinyVAEConfig = SMALL) -> TinyVAE:
    torch.manual_seed(0)
    return TinyVAE(config).eval()


def video(frames: int, size: int = 16) -> torch.Tensor:
    return torch.rand(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published_weights(model: TinyVAE) -> dict[str, torch.Tensor]:
    """Return weights by the rule of the recording: name and shape of a tensor decide its values."""
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        weights[name] = 0.05 * noise if noise.ndim == 1 else noise * math.prod(noise.shape[1:]) ** -0.5
    return weights


@pytest.mark.skipif("PARITY_DATA" not in os.environ, reason="PARITY_DATA is not set: no recordings to compare with")
def test_published_configuration_reproduces_the_recording() -> None:
    model = make(TINY_VAE_PRESETS["taew2.1"])
    model.load_state_dict(published_weights(model))
    case = load_file(Path(os.environ["PARITY_DATA"]) / "case12_taehv.safetensors")
    with torch.no_grad():
        decoded, encoded = model.decode(case["latent"]), model.encode(case["rgb"] * 2 - 1)
    for ours, recorded in [((decoded + 1) / 2, case["decoded"]), (encoded, case["encoded"])]:
        assert ours.shape == recorded.shape
        assert (ours - recorded).abs().max() <= 1e-5 * recorded.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("first_frame_alone", [True, False])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [1, 4], [2, 2, 1]])
def test_streaming_in_any_chunking_equals_one_full_call(first_frame_alone: bool, chunks: list[int]) -> None:
    model = make(replace(SMALL, first_frame_alone=first_frame_alone))
    lead = model.temporal_scale - 1 if first_frame_alone else 0
    frames = video(4 * sum(chunks) - lead)
    latents = model.encode(frames)
    encoder, decoder = model.streaming_encoder(), model.streaming_decoder()
    for _ in range(2):  # again after reset
        pieces = frames.split([4 * n - (lead if i == 0 else 0) for i, n in enumerate(chunks)], dim=1)
        streamed = torch.cat([encoder.encode(piece) for piece in pieces], dim=1)
        assert torch.allclose(streamed, latents, atol=1e-5)
        streamed = torch.cat([decoder.decode(piece) for piece in latents.split(chunks, dim=1)], dim=1)
        assert torch.allclose(streamed, model.decode(latents), atol=1e-5)
        encoder.reset(), decoder.reset()


@torch.no_grad()
def test_decoder_looks_back_but_never_ahead() -> None:
    model = make()
    latents = torch.randn(1, 5, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, 2] += 1
    differs = (model.decode(latents) - model.decode(changed)).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    first_changed = model.num_frames(2)
    assert not differs[:first_changed].any()
    assert differs[first_changed:].all()


@torch.no_grad()
def test_first_latent_stands_for_the_first_frame_alone() -> None:
    model = make()
    latents = model.encode(video(9))
    assert latents.shape == (2, 3, 5, 4, 4)
    assert torch.allclose(latents[:, :1], model.encode(video(9)[:, :1]), atol=1e-6)
    assert model.decode(latents).shape == (2, 9, 3, 16, 16)
    assert (model.num_frames(3), model.num_latents(9), model.num_latents(1)) == (9, 3, 1)


@torch.no_grad()
def test_published_way_repeats_the_last_frame() -> None:
    model = make(replace(SMALL, first_frame_alone=False))
    frames = video(6)
    padded = torch.cat([frames, frames[:, -1:], frames[:, -1:]], dim=1)
    assert torch.equal(model.encode(frames), model.encode(padded))
    assert model.num_latents(6) == 2


@torch.no_grad()
def test_decoded_pixels_are_in_range_unless_asked_otherwise() -> None:
    model = make()
    model.decoder[-1].bias += 10
    latents = torch.randn(1, 2, 5, 4, 4)
    assert model.decode(latents).max() == 1
    assert model.decode(latents, clamp=False).max() > 1


def test_streaming_memory_does_not_grow() -> None:
    decoder = make().streaming_decoder()
    sizes = set()
    for _ in range(4):
        decoder.decode(torch.randn(1, 3, 5, 4, 4))
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in decoder._memory.values()))
        assert not any(tensor.requires_grad for tensor in decoder._memory.values())
    assert len(sizes) == 1


def test_bad_frames_and_latents_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="frames=8 is not 1 plus"):
        model.encode(video(8))
    with pytest.raises(ValueError, match="multiple of 4"):
        model.encode(video(5, size=18))
    with pytest.raises(ValueError, match=r"latents .* are not \[B f 5 h w\]"):
        model.decode(torch.zeros(1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="does not fill whole latents"):
        model.streaming_encoder().encode(video(4))
    with pytest.raises(ValueError, match="needs 3 entries"):
        replace(SMALL, encoder_widths=(8, 8))


def test_saved_folder_gives_the_same_model(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "codec")
    loaded = TinyVAE.from_pretrained(tmp_path / "codec")
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "codec").iterdir()) == ["config.json", "model.safetensors"]


def test_published_file_with_longer_temporal_strides_is_cut_to_the_last_frames(tmp_path: Path) -> None:
    config = replace(SMALL, temporal_strides=(2, 1))
    model = make(config)
    weights = model.state_dict()
    grow = weights["decoder.6.conv.weight"]
    torch.save({**weights, "decoder.6.conv.weight": torch.cat([grow + 1, grow])}, tmp_path / "taew.pth")
    loaded = TinyVAE.from_file(tmp_path / "taew.pth", config)
    assert torch.equal(loaded.state_dict()["decoder.6.conv.weight"], grow)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        TinyVAE.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        TinyVAE.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_blocks": 3}))
    with pytest.raises(UserError, match="decoder"):
        TinyVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(UserError, match="depth"):
        TinyVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_blocks": 10**9}, "must be at most 64"),
        ({"latent_channels": 2**40}, "sizes above 16384"),
        ({"decoder_widths": "wide"}, "decoder_widths = 'wide'"),
        ({"latent_limit": "NaN"}, "must be positive|latent_limit"),
        ({"spatial_strides": [1] * 1000, "temporal_strides": [1] * 1000}, "needs 1001 entries|more than 8 stages"),
    ],
)
def test_sizes_beyond_any_codec_are_refused_before_anything_is_built(tmp_path: Path, change, message) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as error:
        TinyVAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_layer_of_a_huge_number_does_not_cost_a_huge_search(tmp_path: Path) -> None:
    state = make().state_dict() | {"encoder.999999999.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "taew.pth")
    with pytest.raises(UserError, match=r"not a TAEHV|does not fit"):
        TinyVAE.from_file(tmp_path / "taew.pth")
