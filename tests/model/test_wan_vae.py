"""WanVAE on a tiny AutoencoderKLWan with random weights: streaming, normalisation, both file formats."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from model.wan_vae import WanVAE
from tests.fake_release import original_vae_name
from utils.errors import UserError


@pytest.fixture(scope="module")
def codec() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(AutoencoderKLWan(base_dim=8))


def latents(frames: int) -> torch.Tensor:
    return torch.randn(1, frames, 16, 3, 4, generator=torch.Generator().manual_seed(2))


def clip(frames: int) -> torch.Tensor:
    return torch.rand(1, frames, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [1, 3], [2, 2]])
def test_streaming_in_any_chunking_equals_full_decode_bit_for_bit(codec: WanVAE, chunks: list[int]) -> None:
    z = latents(4)
    decoder = codec.streaming_decoder()
    for _ in range(2):  # again after reset
        streamed = torch.cat([decoder.decode(chunk) for chunk in z.split(chunks, dim=1)], dim=1)
        assert torch.equal(streamed, codec.decode(z))
        decoder.reset()
    assert streamed.shape == (1, 13, 3, 24, 32)


@torch.no_grad()
def test_decode_equals_diffusers_on_denormalised_latents(codec: WanVAE) -> None:
    z = latents(3)
    mean, std = (torch.tensor(codec.vae.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    expected = codec.vae.decode((z * std + mean).transpose(1, 2)).sample.transpose(1, 2)
    assert torch.equal(codec.decode(z), expected)


@torch.no_grad()
def test_encode_normalises_the_mode_of_diffusers(codec: WanVAE) -> None:
    frames = clip(5)
    mode = codec.vae.encode(frames.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(codec.vae.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    encoded = codec.encode(frames)
    assert encoded.shape == (1, 2, 16, 2, 3)
    assert torch.allclose(encoded * std + mean, mode, atol=1e-5)


def test_single_image_is_the_first_latent_of_a_clip(codec: WanVAE) -> None:
    assert torch.allclose(codec.encode(clip(1)), codec.encode(clip(5))[:, :1], atol=1e-5)
    assert codec.decode(latents(1)).shape == (1, 1, 3, 24, 32)


def test_two_streams_do_not_disturb_each_other(codec: WanVAE) -> None:
    first, second = codec.streaming_decoder(), codec.streaming_decoder()
    z = latents(2)
    pieces = []
    for latent in z.split(1, dim=1):
        pieces.append(first.decode(latent))
        second.decode(-latent)
        codec.encode(clip(1))
    assert torch.equal(torch.cat(pieces, dim=1), codec.decode(z))


def test_frame_counts_and_shapes(codec: WanVAE) -> None:
    assert (codec.latent_channels, codec.spatial_scale, codec.temporal_scale) == (16, 8, 4)
    assert (codec.num_frames(21), codec.num_latents(81)) == (81, 21)
    with pytest.raises(ValueError, match="frames=6"):
        codec.encode(clip(6))
    with pytest.raises(ValueError, match="multiple of 8"):
        codec.encode(clip(1)[..., :20])
    with pytest.raises(ValueError, match="16"):
        codec.decode(latents(1)[:, :, :8])


def test_both_file_formats_load_without_the_network(codec: WanVAE, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted the network"))
    codec.vae.save_pretrained(tmp_path / "vae")
    original = {original_vae_name(name): tensor for name, tensor in codec.vae.state_dict().items()}
    assert convert_wan_vae_to_diffusers(original).keys() == codec.vae.state_dict().keys()
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    z = latents(2)
    for path in (tmp_path / "vae", tmp_path / "Wan2.1_VAE.pth"):
        assert torch.equal(WanVAE.from_file(path).decode(z), codec.decode(z))


def test_half_precision_weights_take_float32_latents(codec: WanVAE, tmp_path: Path) -> None:
    codec.vae.save_pretrained(tmp_path)
    half = WanVAE.from_file(tmp_path, dtype=torch.bfloat16)
    assert half.vae.dtype is torch.bfloat16
    assert (half.decode(latents(2)) - codec.decode(latents(2))).abs().mean() < 0.02
    assert (half.encode(clip(5)) - codec.encode(clip(5))).abs().mean() < 0.02


def test_wrong_files_are_named(codec: WanVAE, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth"):
        WanVAE.from_file(tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        WanVAE.from_file(tmp_path / "other.pth")
    original = {original_vae_name(name): tensor for name, tensor in codec.vae.state_dict().items()}
    del original["conv2.bias"]
    torch.save(original, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"post_quant_conv\.bias"):
        WanVAE.from_file(tmp_path / "cut.pth")
