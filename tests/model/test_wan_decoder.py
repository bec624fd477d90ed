"""Layers of the Wan decoder: fewer products give the same numbers, earlier frames are kept, one graph is enough."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from model.wan_decoder import CausalConv, ChannelNorm, DoublingConv, WanDecoder, convolve

TOLERANCE = 1e-5  # of the largest value; float32


def frames(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, 6, channels, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


def padded_convolution(conv: CausalConv, x: torch.Tensor) -> torch.Tensor:
    """Compute a causal convolution by its definition: zeros come before the first frame."""
    x = F.pad(x.permute(3, 0, 1, 2)[None], (0, 0, 0, 0, 2, 0))
    padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    return F.conv3d(x, conv.weight, conv.bias, padding=padding)[0].permute(1, 2, 3, 0)


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("chunks", [[7], [1, 2, 4], [3, 3, 1], [1, 1, 1, 1, 1, 1, 1]])
def test_a_causal_convolution_of_pieces_equals_one_of_the_whole(chunks, kernel, reduced) -> None:
    torch.manual_seed(0)
    conv = CausalConv(6, 10, kernel)
    conv.reduce(reduced)
    x, memory = frames(7, 6), {}
    assert_close(torch.cat([convolve(conv, piece, memory) for piece in x.split(chunks)]), padded_convolution(conv, x))
    assert torch.equal(memory[""], x[-2:])


@torch.no_grad()
def test_doubling_with_fewer_products_equals_repeating_pixels() -> None:
    torch.manual_seed(0)
    conv, x = DoublingConv(6, 4), frames(3, 6)
    expected = F.conv2d(F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2), conv.weight, conv.bias, padding=1)
    for reduced in (False, True):
        conv.reduce(reduced)
        assert_close(conv(x), expected.permute(0, 2, 3, 1))


@torch.no_grad()
def test_norm_gives_unit_root_mean_square_and_keeps_nothing_at_nothing() -> None:
    norm = ChannelNorm(6, ndim=3)
    norm.gamma.mul_(3)
    x = frames(2, 6)
    x[0, 0, 0] = 0
    normed = norm(x)
    assert_close(normed, 3 * 6**0.5 * F.normalize(x, dim=-1))
    assert (normed[0, 0, 0] == 0).all()


@torch.no_grad()
def test_reduced_weights_follow_the_switch() -> None:
    conv = CausalConv(2, 2)
    conv.reduce(True)
    assert "reduced" not in conv.state_dict()
    conv.reduce(False)
    assert conv.reduced is None


@torch.no_grad()
def test_one_graph_without_breaks_serves_all_but_the_first_latent() -> None:
    torch.manual_seed(0)
    decoder = WanDecoder(dim=4, latent_channels=4, multipliers=(1, 2), residual_blocks=0, upsample_time=(True,))
    counter, memory, plain_memory = CompileCounter(), {}, {}
    compiled = torch.compile(decoder, backend=counter, fullgraph=True, dynamic=False)
    for seed, count in enumerate((1, 2, 2, 2)):
        latents = frames(count, 4, seed)
        assert_close(compiled(latents, memory), decoder(latents, plain_memory))
    assert counter.frame_count == 2


@torch.no_grad()
def test_rounding_is_no_worse_than_of_the_plain_network() -> None:
    """Both are compared with float64. Rearranged weights do not cost accuracy."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "latent_channels": 4, "multipliers": (1, 2), "residual_blocks": 2, "upsample_time": (True,)}
    decoder, exact = WanDecoder(**sizes), WanDecoder(**sizes).double()
    exact.load_state_dict(decoder.state_dict())
    latents = frames(1, 4), frames(4, 4)

    def decode(network: WanDecoder) -> torch.Tensor:
        memory = {}
        return torch.cat([network(part.to(network.conv_in.weight.dtype), memory) for part in latents])

    def error() -> float:
        return (decode(decoder) - decode(exact)).abs().max().item()

    plain = error()
    for module in decoder.modules():
        if isinstance(module, (CausalConv, DoublingConv)):
            module.reduce(True)
    assert error() < 2 * plain
