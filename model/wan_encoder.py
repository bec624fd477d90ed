"""The streaming encoder of the Wan2.1 video autoencoder. It uses the decoder's layers. For inference only.

Legend: T frames at a layer's own rate, H W their size there, C channels, h w latent size.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from model.wan_decoder import (
    CausalConv,
    ChannelNorm,
    Memory,
    MiddleBlock,
    ResidualBlock,
    activate,
    convolve,
    name_memories,
)


class Downsample(nn.Module):
    """Halves both sides. In time, it keeps the first frame alone and merges the later frames in pairs."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), stride=2) if in_time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.time_conv is None:
            return x
        if self.time_conv.name in memory:
            return convolve(self.time_conv, x, memory)
        self.time_conv.start(x, memory)
        memory[self.time_conv.name].copy_(x)
        return x


class WanEncoder(nn.Module):
    """Turns pixels into the mean and the log variance of latents.

    Args:
        dim: channels at full size.
        latent_channels: C of a latent.
        multipliers: multiples of `dim`, from full size down to the latents' size.
        residual_blocks: the number of residual blocks at each size.
        downsample_time: for each step down from full size, whether it halves the frames.
    """

    def __init__(
        self,
        *,
        dim: int,
        latent_channels: int,
        multipliers: Sequence[int],
        residual_blocks: int,
        downsample_time: Sequence[bool],
    ) -> None:
        super().__init__()
        widths = [dim, *(dim * multiplier for multiplier in multipliers)]
        self.conv_in = CausalConv(3, dim)
        blocks: list[nn.Module] = []
        for level, (n_in, n_out) in enumerate(pairwise(widths)):
            blocks += [ResidualBlock(n_out if i else n_in, n_out) for i in range(residual_blocks)]
            if level < len(downsample_time):
                blocks.append(Downsample(n_out, in_time=downsample_time[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MiddleBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1], ndim=3)
        self.conv_out = CausalConv(widths[-1], 2 * latent_channels)
        name_memories(self)

    def forward(self, frames: Tensor, memory: Memory) -> Tensor:
        """Frames [F H W 3] -> mean and log variance [f h w 2C]; a stream begins with F = 1, which gives one latent."""
        x = convolve(self.conv_in, frames, memory)
        for block in self.down_blocks:
            x = block(x, memory)
        return self.conv_out(activate(self.norm_out, self.conv_out, self.mid_block(x, memory), memory))
