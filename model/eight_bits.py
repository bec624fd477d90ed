"""Numbers of 8 bits with scales: for the KV cache, and to see on any device what 8-bit products cost in quality.

The products here are computed in ordinary precision from values that 8 bits can hold. The results are those of 8-bit
products, up to the order of sums; the speed is not.

Shapes: B batch, L query tokens, S key tokens, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
INT8_MAX = 127
SMALLEST = 1e-12
"""The smallest magnitude that a scale is made for."""
QUERY_BLOCK, KEY_BLOCK = 128, 64
"""Tokens that share a scale, as in SageAttention."""
SLAB = 1024
"""Queries whose weights are in memory at a time."""


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [... D] as 8-bit floats [... D] with a float32 scale [... 1] for each row."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / torch.finfo(FP8).max
    return (x.float() / scale).to(FP8), scale


def rounded_rows(x: Tensor) -> Tensor:
    """Round x [... D] to 8-bit floats, with a scale for each row."""
    data, scale = to_fp8(x)
    return (data.float() * scale).to(x.dtype)


class RoundedLinear(nn.Linear):
    """A linear layer whose weights and inputs have the values of 8-bit floats, with a scale for each row.

    It gives what ``optimize.quantize=fp8`` gives on a GPU that has such products.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> RoundedLinear:
        """Round the weights of a layer."""
        with torch.device("meta"):
            rounded = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        rounded.weight = nn.Parameter(rounded_rows(layer.weight.detach()), requires_grad=False)
        rounded.bias = layer.bias
        return rounded

    def forward(self, x: Tensor) -> Tensor:
        """[... in_features] -> [... out_features]."""
        return F.linear(rounded_rows(x), self.weight, self.bias)


def round_linears(module: nn.Module) -> None:
    """Replace every linear layer in a module by a :class:`RoundedLinear`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, RoundedLinear.of(child))


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with q and k in 8-bit integers (SageAttention, arXiv 2410.02367): q [B L N D], k, v [B S N D].

    The mean of all keys is taken off first. It adds the same to every logit of a query, so the softmax does not change,
    and what remains needs smaller scales.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = (x.to(v.dtype) for x in rounded_logits(q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, and v and the weights of the softmax in 8-bit floats (SageAttention2, arXiv 2411.10958).

    v has a scale for each head and channel. Weights are rounded before they are divided by their sum.
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    q, k = rounded_logits(q, k)
    v = rounded_rows(v.transpose(2, 3)).transpose(2, 3)
    outputs = []
    for queries in q.split(SLAB, dim=2):
        logits = queries @ k.transpose(2, 3) * scale
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        largest = torch.finfo(FP8).max
        rounded = (weights * largest).to(FP8).float() / largest
        outputs.append(rounded @ v / weights.sum(-1, keepdim=True))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def rounded_logits(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q [B N L D] and k [B N S D] less its mean over all keys, rounded to 8-bit integers."""
    k = k.float()
    return rounded_blocks(q, QUERY_BLOCK), rounded_blocks(k - k.mean(2, keepdim=True), KEY_BLOCK)


def rounded_blocks(x: Tensor, tokens: int) -> Tensor:
    """Round x [B N L D] to 8-bit integers times a scale for each head and block of ``tokens`` tokens; float32."""
    length = x.shape[2]
    blocks = F.pad(x.float(), (0, 0, 0, -length % tokens)).unflatten(2, (-1, tokens))
    scale = blocks.abs().amax((-2, -1), keepdim=True).clamp_min(SMALLEST) / INT8_MAX
    return ((blocks / scale).round() * scale).flatten(2, 3)[:, :, :length]
