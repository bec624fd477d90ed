"""WanVAE on a tiny autoencoder with random weights: diffusers' results, streaming, tiles, memory, file formats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from model.tiling import TileConfig
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE
from model.wan_vae_files import WAN_VAE_TO_DIFFUSERS
from model.weights import check_fit, rename_keys
from tests.fake_release import original_vae_name
from utils.errors import UserError

TOLERANCE = 1e-5  # of the largest value; float32


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8).eval()


@pytest.fixture(scope="module")
def codec(theirs: AutoencoderKLWan) -> WanVAE:
    network = WanAutoencoder(WanVAEConfig(base_dim=8))
    network.load_state_dict(theirs.state_dict())
    return WanVAE(network)


@pytest.fixture(scope="module")
def folder(codec: WanVAE, tmp_path_factory) -> Path:
    """Give the codec as a diffusers folder."""
    path = tmp_path_factory.mktemp("vae")
    codec.vae.save_pretrained(path)
    return path


def latents(frames: int, height: int = 3, width: int = 4) -> torch.Tensor:
    return torch.randn(1, frames, 16, height, width, generator=torch.Generator().manual_seed(2))


def clip(frames: int) -> torch.Tensor:
    return torch.rand(1, frames, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


def choose(codec: WanVAE, monkeypatch: pytest.MonkeyPatch, reduced: bool) -> None:
    """Choose convolutions with fewer products, or plain ones."""
    for name in ("winograd", "folded"):
        monkeypatch.setattr(codec, name, reduced)


def statistics(theirs: AutoencoderKLWan) -> list[torch.Tensor]:
    return [torch.tensor(theirs.config[key])[:, None, None] for key in ("latents_mean", "latents_std")]


@pytest.fixture(scope="module")
@torch.no_grad()
def their_frames(theirs: AutoencoderKLWan) -> torch.Tensor:
    """Give what diffusers decodes from five latents."""
    mean, std = statistics(theirs)
    return theirs.decode((latents(5) * std + mean).transpose(1, 2)).sample.transpose(1, 2)


@pytest.fixture(scope="module")
@torch.no_grad()
def their_latents(theirs: AutoencoderKLWan) -> torch.Tensor:
    """Give what diffusers encodes from 13 frames."""
    mean, std = statistics(theirs)
    return (theirs.encode(clip(13).transpose(1, 2)).latent_dist.mode().transpose(1, 2) - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [3, 2], [1, 4]])
def test_streaming_decode_in_any_chunking_equals_diffusers(codec, their_frames, monkeypatch, chunks, reduced) -> None:
    choose(codec, monkeypatch, reduced)
    z, expected = latents(5), their_frames
    decoder = codec.streaming_decoder()
    for _ in range(2):  # again after reset
        assert_close(torch.cat([decoder.decode(chunk) for chunk in z.split(chunks, dim=1)], dim=1), expected)
        decoder.reset()


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("chunks", [[13], [1, 4, 4, 4], [5, 8]])
def test_streaming_encode_in_any_chunking_equals_diffusers(codec, their_latents, monkeypatch, chunks, reduced) -> None:
    choose(codec, monkeypatch, reduced)
    frames = clip(13)
    encoder = codec.streaming_encoder()
    for _ in range(2):
        encoded = torch.cat([encoder.encode(piece) for piece in frames.split(chunks, dim=1)], dim=1)
        assert_close(encoded, their_latents)
        encoder.reset()


def test_latents_taken_one_at_a_time_give_the_same_frames(codec: WanVAE, monkeypatch) -> None:
    whole = codec.decode(latents(4))
    monkeypatch.setattr("model.wan_autoencoder.CPU_CALL_BYTES", 1)
    assert_close(codec.decode(latents(4)), whole)


def test_single_image_is_the_first_latent_of_a_clip(codec: WanVAE) -> None:
    assert torch.allclose(codec.encode(clip(1)), codec.encode(clip(5))[:, :1], atol=1e-5)
    assert codec.decode(latents(1)).shape == (1, 1, 3, 24, 32)


def test_streams_and_clips_do_not_disturb_each_other(codec: WanVAE) -> None:
    first, second = codec.streaming_decoder(), codec.streaming_decoder()
    z = latents(2)
    pieces = []
    for latent in z.split(1, dim=1):
        pieces.append(first.decode(latent))
        second.decode(-latent)
        codec.encode(clip(1))
    assert torch.equal(torch.cat(pieces, dim=1), codec.decode(z))
    assert torch.equal(codec.decode(torch.cat([-z, z]))[1:], codec.decode(z))
    with pytest.raises(ValueError, match="2 clips"):
        first.decode(torch.cat([z, z]))


def test_what_a_stream_keeps_does_not_grow(codec: WanVAE) -> None:
    decoder = codec.streaming_decoder()
    kept = set()
    for _ in range(4):
        decoder.decode(latents(2))
        kept.add(tuple((name, tensor.data_ptr()) for name, tensor in decoder._memories[0].items()))
    assert len(kept) == 1


def test_weights_loaded_later_count(codec: WanVAE, theirs: AutoencoderKLWan) -> None:
    other = WanVAE(WanAutoencoder(WanVAEConfig(base_dim=8)))
    with torch.inference_mode():
        other.decode(latents(1))
    other.vae.load_state_dict(theirs.state_dict())
    assert torch.equal(other.decode(latents(2)), codec.decode(latents(2)))


def psnr(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (ours - expected).square().mean())).item()


def test_one_tile_changes_nothing_and_smaller_ones_little(codec: WanVAE, monkeypatch) -> None:
    """Random weights are the hard case: they depend more on distant pixels than trained ones."""
    z = latents(2, 14, 16)
    whole = codec.decode(z)
    quality = []
    for config in (TileConfig(tile=128, overlap=16), TileConfig(tile=96, overlap=48), TileConfig(tile=48, overlap=16)):
        monkeypatch.setattr(codec, "tiling", config)
        quality.append(psnr(codec.decode(z), whole))
    one, large, small = quality
    assert one > 100
    assert large > 28 > small + 5 > 23


def test_tiles_in_a_stream_equal_tiles_of_the_whole(codec: WanVAE, monkeypatch) -> None:
    z = latents(3, 8, 10)
    monkeypatch.setattr(codec, "tiling", TileConfig(tile=48, overlap=16))
    decoder = codec.streaming_decoder()
    for size in (10, 8):  # again after reset, at another size
        part = z[..., :size]
        streamed = torch.cat([decoder.decode(piece) for piece in part.split([1, 2], dim=1)], dim=1)
        assert_close(streamed, codec.decode(part))
        decoder.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [None, TileConfig(tile=48, overlap=16)])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_gpu_in_half_precision_gives_nearly_the_same_frames(codec, folder, monkeypatch, reduced, tiling) -> None:
    monkeypatch.setattr(codec, "tiling", tiling)
    z = latents(5, 8, 10)
    expected = codec.decode(z)
    there = WanVAE.from_file(folder, dtype=torch.bfloat16).to("cuda")
    there.winograd = there.folded = reduced
    there.tiling = tiling
    decoder = there.streaming_decoder()
    frames = torch.cat([decoder.decode(piece.cuda()) for piece in z.split([1, 2, 2], dim=1)], dim=1)
    assert frames.is_cuda
    assert (frames.cpu() - expected).abs().mean() < 0.02


MEASURE = """
import json, torch
from model.tiling import TileConfig
from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_vae import WanVAE

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(codec, latents):
    codec.streaming_decoder().decode(latents[..., :2, :2])  # libraries keep what their first call allocates
    decoder = codec.streaming_decoder()
    before = memory("VmRSS")
    used = []
    for chunk in latents.split(1, dim=1):
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        decoder.decode(chunk)
        used.append(memory("VmHWM") - before)
    height, width = (8 * size for size in latents.shape[-2:])
    return used[1:], codec.decode_bytes(height, width, 1)

torch.set_num_threads(1)
z = torch.randn(1, 3, 16, 16, 24)
wan = WanVAE(WanAutoencoder(WanVAEConfig(base_dim=8)))
tiny = TinyVAE(TinyVAEConfig()).requires_grad_(False)
print(json.dumps([peak(wan, z), peak(tiny, z)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_memory_is_flat_and_near_the_estimate() -> None:
    """A new process measures both codecs. It returns freed memory to the system at once."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "524288"},
        capture_output=True,
        text=True,
        check=True,
    )
    for (second, third), estimate in json.loads(run.stdout):
        assert abs(third - second) < 0.1 * second
        assert 0.6 * estimate < third < 1.1 * estimate


def test_frame_counts_and_shapes(codec: WanVAE) -> None:
    assert (codec.latent_channels, codec.spatial_scale, codec.temporal_scale) == (16, 8, 4)
    assert (codec.num_frames(21), codec.num_latents(81)) == (81, 21)
    with pytest.raises(ValueError, match="frames=6"):
        codec.encode(clip(6))
    encoder = codec.streaming_encoder()
    encoder.encode(clip(1))
    with pytest.raises(ValueError, match="a chunk of 5 frames"):
        encoder.encode(clip(5))
    with pytest.raises(ValueError, match="multiple of 8"):
        codec.encode(clip(1)[..., :20])
    with pytest.raises(ValueError, match="16"):
        codec.decode(latents(1)[:, :, :8])


def test_every_tensor_of_the_published_size_has_its_place() -> None:
    with torch.device("meta"):
        ours, theirs = WanAutoencoder(WanVAEConfig()), AutoencoderKLWan()
    assert WanVAEConfig().latents_mean == tuple(theirs.config.latents_mean)
    assert WanVAEConfig().latents_std == tuple(theirs.config.latents_std)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    check_fit(ours, theirs.state_dict(), source="diffusers")
    original = {original_vae_name(name): tensor for name, tensor in theirs.state_dict().items()}
    renamed, converted = rename_keys(original, WAN_VAE_TO_DIFFUSERS), convert_wan_vae_to_diffusers(dict(original))
    assert renamed.keys() == converted.keys()
    assert all(renamed[name] is tensor for name, tensor in converted.items())


def test_both_file_formats_load_without_the_network(codec: WanVAE, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted the network"))
    original = {original_vae_name(name): tensor for name, tensor in codec.vae.state_dict().items()}
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    z = latents(2)
    for path in (folder, tmp_path / "Wan2.1_VAE.pth"):
        assert torch.equal(WanVAE.from_file(path).decode(z), codec.decode(z))


@torch.no_grad()
def test_diffusers_reads_a_saved_folder_and_we_read_its(codec, theirs, folder: Path, tmp_path: Path) -> None:
    loaded = AutoencoderKLWan.from_pretrained(folder)
    assert {name: value for name, value in loaded.config.items() if name[0] != "_"} == {
        name: value for name, value in theirs.config.items() if name[0] != "_"
    } | {"decoder_base_dim": None}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path)
    assert torch.equal(WanVAE.from_file(tmp_path).decode(latents(2)), codec.decode(latents(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_take_float32_latents(codec: WanVAE, folder: Path, dtype: torch.dtype) -> None:
    half = WanVAE.from_file(folder, dtype=dtype)
    assert half.vae.dtype is dtype
    for reduced in (False, True):
        half.winograd = half.folded = reduced
        assert (half.decode(latents(2)) - codec.decode(latents(2))).abs().mean() < 0.02
        assert (half.encode(clip(5)) - codec.encode(clip(5))).abs().mean() < 0.02


def test_wrong_files_are_named(codec: WanVAE, folder: Path, tmp_path: Path) -> None:
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
    (tmp_path / "model.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
    for text, message in (('{"patch_size": 2}', "patch_size=2"), ('{"dim_mult": [1, 2]}', "dim_mult")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            WanVAE.from_file(tmp_path)
