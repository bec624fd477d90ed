"""The streaming decoder of the Wan2.1 video autoencoder, and the layers that its encoder shares. For inference only.

Parameters have the names and shapes of diffusers' AutoencoderKLWan, and the results are the same. The computation
differs: it takes one clip at a time, with channels last in all layers, and any number of latents in a call. Each causal
convolution reads one buffer, into which its past and its input are written directly.

Legend: T frames at a layer's own rate, H W their size there, C channels, h w latent size.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.fused_ops import add_shortcut, norm_silu

Memory = dict[str, Tensor]
"""Name of a causal convolution -> its last input frames [2 H W C]. Empty before a stream begins."""

NORM_FLOOR = 1e-12  # of the length of a position's vector, as in torch.nn.functional.normalize


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to [T H W C] as a linear layer."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each frame of [T H W C] separately, to the same size."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)


class ChannelNorm(nn.Module):
    """Brings the channels of each position to unit root mean square, then scales them by `gamma` [C 1 1 (1)].

    `fused`: the norms before a causal convolution, see `activate`, are computed by the operators of `model.fused_ops`.
    """

    def __init__(self, dim: int, *, ndim: int) -> None:
        super().__init__()
        self.fused = False
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ndim))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T H W C] -> the same shape, in `out` if given."""
        precise = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise).clamp_min_(NORM_FLOOR)
        out = x.new_empty(x.shape) if out is None else out
        return torch.div(x, length.mul_(x.shape[-1] ** -0.5), out=out).mul_(self.gamma.flatten())


class CausalConv(nn.Conv3d):
    """A convolution in which a frame sees itself and the two frames before it. `memory` keeps those between calls.

    `reduced` holds the weights as Winograd's F(2, 3) over time needs them: each pair of frames then takes four 2-D
    convolutions instead of six (Lavin & Gray, arXiv:1509.09308, in one dimension). None: as written.
    """

    def __init__(self, n_in: int, n_out: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, (stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.kept = kernel[0] - stride
        self.name = ""  # the name of its memory; see `name_memories`
        self.register_buffer("reduced", None, persistent=False)

    def reduce(self, enabled: bool) -> None:
        """Compute with fewer products if `enabled`, else as an ordinary convolution."""
        if not enabled or self.stride[0] > 1:
            self.reduced = None
        elif self.reduced is None:
            first, middle, last = rearrange(self.weight, "o i t h w -> t o h w i")
            halves = (first + middle + last) / 2, (first - middle + last) / 2
            self.reduced = torch.stack([first, *halves, -last])

    def start(self, x: Tensor, memory: Memory) -> None:
        """Begin a stream of frames like `x` [T H W C], with an empty past."""
        memory[self.name] = x.new_zeros(self.kept, *x.shape[1:])

    def past(self, x: Tensor, memory: Memory) -> Tensor:
        """The frames kept [kept H W C'] before frames like `x` [T H W C']; zeros if a stream begins."""
        if self.name not in memory:
            self.start(x, memory)
        return memory[self.name]

    def buffer(self, x: Tensor, memory: Memory) -> Tensor:
        """Return a buffer with the kept frames, and room after them for as many frames as `x` [T H W C] has."""
        buffer = x.new_empty(self.kept + len(x), *x.shape[1:])
        buffer[: self.kept] = self.past(x, memory)
        return buffer

    def keep(self, buffer: Tensor, memory: Memory) -> None:
        """Remember the last frames of a filled buffer [kept+T H W C]."""
        memory[self.name].copy_(buffer[-self.kept :])

    def forward(self, buffer: Tensor, *, biased: bool = True) -> Tensor:
        """A filled buffer [kept+T H W C] -> [T H W C'], or half as many frames at stride 2.

        `biased`: add the bias; False leaves it to the operation that follows.
        """
        bias = self.bias if biased else None
        if self.reduced is not None:
            return self._in_pairs(buffer, bias)
        x = rearrange(buffer, "t h w c -> 1 c t h w")
        return F.conv3d(x, self.weight, bias, self.stride, self.padding)[0].permute(1, 2, 3, 0)

    def _in_pairs(self, buffer: Tensor, bias: Tensor | None) -> Tensor:
        frames = len(buffer) - self.kept
        paired = frames - frames % 2
        out = buffer.new_empty(frames, *buffer.shape[1:3], self.out_channels)
        if paired:
            a, b, c, d = (buffer[i : i + paired : 2] for i in range(4))
            first, sum_, difference, last = rearrange(self.reduced, "k o h w i -> k o i h w")
            both, other = convolve_frames(b + c, sum_), convolve_frames(c - b, difference)
            even = convolve_frames(a - c, first, bias).add_(both)
            torch.add(even, other, out=out[:paired:2])
            odd = convolve_frames(b - d, last, bias).add_(both)
            torch.sub(odd, other, out=out[1:paired:2])
        if frames > paired:
            first, middle, last = self.weight.unbind(2)
            alone = convolve_frames(buffer[-3:-2], first, bias).add_(convolve_frames(buffer[-2:-1], middle))
            torch.add(alone, convolve_frames(buffer[-1:], last), out=out[-1:])
        return out


def name_memories(module: nn.Module) -> None:
    """Give each causal convolution in the module its name there."""
    for name, child in module.named_modules():
        if isinstance(child, CausalConv):
            child.name = name


def activate(norm: ChannelNorm, conv: CausalConv, x: Tensor, memory: Memory, *, bias: Tensor | None = None) -> Tensor:
    """Normalise `x + bias` [T H W C] and apply SiLU, straight into a buffer for `conv`, which remembers its end."""
    if norm.fused:
        return norm_silu(x, bias, norm.gamma.flatten(), conv.past(x, memory), NORM_FLOOR)
    x = x if bias is None else x + bias
    buffer = conv.buffer(x, memory)
    F.silu(norm(x, out=buffer[conv.kept :]), inplace=True)
    conv.keep(buffer, memory)
    return buffer


def convolve(conv: CausalConv, x: Tensor, memory: Memory) -> Tensor:
    """Convolve `x` [T H W C] without normalisation and activation."""
    buffer = conv.buffer(x, memory)
    buffer[conv.kept :] = x
    conv.keep(buffer, memory)
    return conv(buffer)


class ResidualBlock(nn.Module):
    """Two normalised causal convolutions with a shortcut."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(n_in, ndim=3)
        self.conv1 = CausalConv(n_in, n_out)
        self.norm2 = ChannelNorm(n_out, ndim=3)
        self.conv2 = CausalConv(n_out, n_out)
        self.conv_shortcut = nn.Conv3d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        shortcut = x if self.conv_shortcut is None else pointwise(self.conv_shortcut, x)
        if self.norm1.fused:
            return self._fused(x, shortcut, memory)
        inner = self.conv1(activate(self.norm1, self.conv1, x, memory))
        return self.conv2(activate(self.norm2, self.conv2, inner, memory)).add_(shortcut)

    def _fused(self, x: Tensor, shortcut: Tensor, memory: Memory) -> Tensor:
        """The same; the kernel that follows a convolution adds its bias."""
        inner = self.conv1(activate(self.norm1, self.conv1, x, memory), biased=False)
        inner = self.conv2(activate(self.norm2, self.conv2, inner, memory, bias=self.conv1.bias), biased=False)
        return add_shortcut(inner, self.conv2.bias, shortcut)


class PlaneAttention(nn.Module):
    """Attention between the positions of each frame, with one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, ndim=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(pointwise(self.to_qkv, self.norm(x)), "t h w (three c) -> three t 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(*qkv)
        return pointwise(self.proj, attended.reshape(x.shape)).add_(x)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PlaneAttention(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, memory)), memory)


class DoublingConv(nn.Conv2d):
    """Doubles both sides by repeating pixels, then convolves 3x3.

    `reduced` holds the weights of the transposed convolution that does both: 16 products a pixel instead of 36.
    None: as written.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3, padding=1)
        self.register_buffer("reduced", None, persistent=False)

    def reduce(self, enabled: bool) -> None:
        """Compute with fewer products if `enabled`, else as an ordinary convolution."""
        if not enabled:
            self.reduced = None
        elif self.reduced is None:
            square = self.weight.new_ones(1, 1, 2, 2)
            spread = F.conv_transpose2d(self.weight.flatten(0, 1)[:, None], square).unflatten(0, self.weight.shape[:2])
            self.reduced = rearrange(spread.flip(-1, -2), "o i 1 h w -> i o h w").contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[T H W C] -> [T 2H 2W C']."""
        x = x.permute(0, 3, 1, 2)
        if self.reduced is None:
            x = super().forward(F.interpolate(x, scale_factor=2))
        else:
            x = F.conv_transpose2d(x, self.reduced, self.bias, stride=2, padding=1)
        return x.permute(0, 2, 3, 1)


class Upsample(nn.Module):
    """Doubles both sides and halves the channels. In time, it doubles every frame except those of the first latent."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), DoublingConv(dim, dim // 2))
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, memory)
        return self.resample(x)

    @staticmethod
    def _double_frames(conv: CausalConv, x: Tensor, memory: Memory) -> Tensor:
        if conv.name in memory:
            return rearrange(convolve(conv, x, memory), "t h w (two c) -> (t two) h w c", two=2)
        conv.start(x, memory)  # it does not see the first latent, not even as its past
        return x


class UpBlock(nn.Module):
    """Residual blocks at one size, then the step to the next."""

    def __init__(self, n_in: int, n_out: int, *, blocks: int, upsample: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, memory)
        return x if self.upsamplers is None else self.upsamplers[0](x, memory)


class WanDecoder(nn.Module):
    """Latents to pixels.

    Args:
        dim: channels at full size.
        latent_channels: C of a latent.
        multipliers: multiples of `dim`, from full size down to the latents' size.
        residual_blocks: one less than the number of residual blocks at each size.
        upsample_time: for each step up from the latents' size, whether it doubles the frames.
    """

    def __init__(
        self,
        *,
        dim: int,
        latent_channels: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        upsample_time: Sequence[bool],
    ) -> None:
        super().__init__()
        widths = [dim * multiplier for multiplier in reversed(multipliers)]
        self.conv_in = CausalConv(latent_channels, widths[0])
        self.mid_block = MiddleBlock(widths[0])
        inputs = [widths[0], *(width // 2 for width in widths[:-1])]
        upsamples = [*(Upsample(width, in_time=t) for width, t in zip(widths, upsample_time, strict=False)), None]
        self.up_blocks = nn.ModuleList(
            UpBlock(n_in, n_out, blocks=residual_blocks + 1, upsample=upsample)
            for n_in, n_out, upsample in zip(inputs, widths, upsamples, strict=True)
        )
        self.norm_out = ChannelNorm(widths[-1], ndim=3)
        self.conv_out = CausalConv(widths[-1], 3)
        name_memories(self)

    def forward(self, latents: Tensor, memory: Memory) -> Tensor:
        """Latents [f h w C] -> frames [F H W 3], unclamped; a stream begins with f = 1, which gives one frame."""
        x = self.mid_block(convolve(self.conv_in, latents, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
        return self.conv_out(activate(self.norm_out, self.conv_out, x, memory))
