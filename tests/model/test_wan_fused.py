"""The Wan VAE with fused kernels, folded upsampling and Winograd gives the same stream as the plain one."""

import pytest
import torch

from model.fused_ops import add_shortcut
from model.wan_autoencoder import WanAutoencoder, WanVAEConfig
from model.wan_decoder import CausalConv, ChannelNorm, activate
from model.wan_vae import WanVAE
from pipeline.optimize import Kernels, OptimizeConfig, optimize_codec
from tests.parity import random, relative_error
from utils.errors import UserError

pytest.importorskip("triton", reason="fused kernels need triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""For one layer, relative to the largest value of the plain layer in float32."""
CODEC_BOUND = 1e-5
"""For the whole network in float32, relative to the largest value."""
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(*shape, seed=seed).to(DEVICE, dtype)


@pytest.fixture(scope="module")
def codec() -> WanVAE:
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temperal_downsample": (True,)}
    latents = {"z_dim": 4, "latents_mean": (0.1,) * 4, "latents_std": (2.0,) * 4}
    network = WanAutoencoder(WanVAEConfig(**sizes, **latents))
    for module in network.modules():
        if isinstance(module, ChannelNorm):
            torch.nn.init.uniform_(module.gamma, 0.5, 1.5)
    return WanVAE(network.to(DEVICE))


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", [6, 80])
def test_norm_and_silu_go_into_the_buffer_and_its_end_into_the_memory(dtype, biased, channels):
    """This also holds for pieces of one frame, which move the memory by one."""
    conv, norm = CausalConv(channels, 1).to(DEVICE), ChannelNorm(channels, ndim=3).to(DEVICE)
    norm.gamma.copy_(made(channels, dtype=dtype)[:, None, None, None])
    x, bias = made(7, 2, 3, channels, dtype=dtype), made(channels, seed=1, dtype=dtype) if biased else None
    x[0, 0, 0] = 0  # a vector without length
    plain_memory, memory = {}, {}
    fused_norm = ChannelNorm(channels, ndim=3).to(DEVICE, dtype)
    fused_norm.load_state_dict(norm.state_dict())
    fused_norm.fused = True
    for piece in x.split([1, 1, 2, 3]):
        wanted = None if bias is None else bias.float()
        expected = activate(norm, conv, piece.float(), plain_memory, bias=wanted)
        buffer = activate(fused_norm, conv, piece, memory, bias=bias)
        assert relative_error(buffer.float(), expected) <= BOUNDS[dtype]
        assert torch.equal(memory[""], buffer[-2:])


@torch.no_grad()
@DTYPES
def test_a_shortcut_and_the_bias_a_convolution_left_out_are_added(dtype):
    x, shortcut, bias = made(2, 3, 5, 6, dtype=dtype), made(2, 3, 5, 6, seed=1, dtype=dtype), made(6, dtype=dtype)
    expected = x.float() + bias.float() + shortcut.float()
    assert relative_error(add_shortcut(x, bias, shortcut).float(), expected) <= BOUNDS[dtype]
    conv, buffer = CausalConv(6, 4).to(DEVICE), made(4, 3, 5, 6)
    for reduced in (False, True):
        conv.reduce(reduced)
        assert relative_error(conv(buffer, biased=False) + conv.bias, conv(buffer)) <= BOUNDS[torch.float32]


def choices() -> list[OptimizeConfig]:
    return [
        OptimizeConfig(kernels=kernels, codec_winograd=winograd) for kernels in Kernels for winograd in (False, True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("config", choices(), ids=lambda config: f"{config.kernels.value}-{config.codec_winograd}")
def test_a_stream_gives_the_same_latents_and_frames_whichever_way_it_is_computed(codec, config):
    frames, latents = made(1, 7, 3, 4, 6).clamp(-1, 1), made(1, 4, 4, 2, 3)
    codec.winograd = codec.folded = codec.fused = False  # as written
    encoded, decoded = codec.encode(frames), codec.decode(latents)
    optimize_codec(codec, config)
    encoder, decoder = codec.streaming_encoder(), codec.streaming_decoder()
    for _ in range(2):  # again after reset
        again = torch.cat([encoder.encode(piece) for piece in frames.split([1, 4, 2], dim=1)], dim=1)
        assert relative_error(again, encoded) <= CODEC_BOUND
        again = torch.cat([decoder.decode(piece) for piece in latents.split([1, 1, 2], dim=1)], dim=1)
        assert relative_error(again, decoded) <= CODEC_BOUND
        encoder.reset()
        decoder.reset()
    state = {name: tensor.clone() for name, tensor in codec.vae.state_dict().items()}
    codec.vae.load_state_dict(state)  # new weights: nothing of the old ones may stay
    assert relative_error(codec.decode(latents), decoded) <= CODEC_BOUND


def test_a_decoder_with_fused_kernels_is_one_graph_without_breaks(codec):
    from torch._dynamo.testing import CompileCounterWithBackend

    codec.winograd = codec.folded = codec.fused = False
    latents = made(3, 2, 3, 4)
    with torch.no_grad():
        expected = codec.vae.decode(latents[:1], plain := {}), codec.vae.decode(latents[1:], plain)
        codec.vae.prepare(winograd=False, folded=True, fused=True)
        counter, memory = CompileCounterWithBackend("aot_eager"), {}
        compiled = torch.compile(codec.vae.decode, backend=counter, fullgraph=True, dynamic=False)
        for piece, frames in zip((latents[:1], latents[1:]), expected, strict=True):
            assert relative_error(compiled(piece, memory), frames) <= CODEC_BOUND
    assert counter.frame_count == 2
    assert all(relative_error(memory[name], plain[name]) <= CODEC_BOUND for name in plain)


def test_a_codec_is_left_as_it_is_unless_asked_and_refused_where_kernels_cannot_run(codec, monkeypatch):
    codec.winograd, codec.folded, codec.fused = None, None, False
    optimize_codec(codec, OptimizeConfig())
    assert (codec.winograd, codec.folded, codec.fused) == (None, None, False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(WanAutoencoder, "device", torch.device("cpu"))
    with pytest.raises(UserError, match=r"optimize\.kernels=triton needs a CUDA device, not cpu"):
        optimize_codec(codec, OptimizeConfig(kernels=Kernels.triton))
