"""GAN heads on the features of a diffusion transformer (Self Forcing, Section 3.3; Seaweed-APT, arXiv 2501.08316).

Shapes: B batch, F latent frames, T tokens a frame, C model dim, R register tokens, K heads, L E text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.attention import AttentionBackend
from model.kv_cache import CachedText
from model.layers import CrossAttention, LayerNorm
from model.transformer import WanTransformer


@dataclass
class DiscriminatorConfig:
    """The depths at which the heads read, and the size of the heads."""

    depths: list[float] = field(default_factory=lambda: [0.47, 0.73, 1.0])
    """The depths of the heads as ascending shares of the backbone. With 30 blocks: after the 14th, 22nd and 30th."""
    registers: int = 1
    """The number of learned tokens of a head. They gather information from the whole video."""

    def __post_init__(self) -> None:
        if not self.depths or any(a >= b for a, b in pairwise(self.depths)):
            raise ValueError(f"depths={self.depths} must be in ascending order")
        if self.depths[0] <= 0 or self.depths[-1] > 1:
            raise ValueError(f"depths={self.depths} must lie in (0, 1]")
        if self.registers < 1:
            raise ValueError(f"registers={self.registers} must be at least 1")

    def layers(self, num_layers: int) -> list[int]:
        """Return the indices of the blocks that heads read. ValueError if two depths give the same block."""
        layers = [max(0, round(depth * num_layers) - 1) for depth in self.depths]
        if len(set(layers)) < len(layers):
            raise ValueError(
                f"depths={self.depths} select blocks {layers} of {num_layers}, one of them twice; use fewer depths"
            )
        return layers


class RegisterHead(nn.Module):
    """Register tokens gather the features of one depth by cross-attention. An MLP turns them into a logit."""

    def __init__(self, dim: int, num_heads: int, registers: int, eps: float) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(registers, dim) * dim**-0.5)
        self.norm = LayerNorm(dim, eps)
        self.attention = CrossAttention(dim, num_heads, eps)
        self.mlp = nn.Sequential(
            LayerNorm(registers * dim, eps), nn.Linear(registers * dim, dim), nn.SiLU(), nn.Linear(dim, 1)
        )

    def forward(self, features: Tensor, *, backend: AttentionBackend) -> Tensor:
        """Turn features [B F T C] into logits [B], float32."""
        tokens = self.registers.expand(features.shape[0], 1, -1, -1)
        video = self.norm(features.to(tokens).flatten(1, 2))
        video = CachedText(*self.attention.key_value(video), None)
        tokens = tokens + self.attention(tokens, video, backend=backend)
        return self.mlp(tokens.flatten(1)).squeeze(1).float()


class Discriminator(nn.Module):
    """Tells real noisy videos from generated ones. It has a backbone (usually the critic's) and a head at each depth.

    Args:
        transformer: the backbone. It is shared, not copied, so training the discriminator trains it too.
        config: the depths and registers.
        generator: draws the initial weights of the heads.

    The heads are small. They may stay in float32 over a backbone in half precision: penalties that take finite
    differences of the logits need it.
    """

    def __init__(
        self, transformer: WanTransformer, config: DiscriminatorConfig, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        sizes = transformer.config
        self.transformer = transformer
        self.layers: Sequence[int] = config.layers(sizes.num_layers)
        self.heads = nn.ModuleList(
            RegisterHead(sizes.dim, sizes.num_heads, config.registers, sizes.eps) for _ in self.layers
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the heads with Xavier matrices. The logits start at zero, so the first steps change little."""
        for head in self.heads:
            nn.init.normal_(head.registers, std=head.registers.shape[1] ** -0.5, generator=generator)
            for layer in head.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, generator=generator)
                    nn.init.zeros_(layer.bias)
            nn.init.zeros_(head.mlp[-1].weight)

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return logits [B K] in float32, high for real, for latents [B F C H W], timesteps [B F], prompts [B L E]."""
        features = self.transformer.features(latents, timesteps, prompt_embeds, self.layers)
        # The heads may be in float32. If the kernel takes only half precision, sdpa computes their attention.
        backend = self.transformer.resolved_backend(latents.device, features[0].dtype)
        logits = [head(x, backend=backend) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1)
