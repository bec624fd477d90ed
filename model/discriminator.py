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
    """Where the heads read, and how wide they read."""

    depths: list[float] = field(default_factory=lambda: [0.47, 0.73, 1.0])
    """Ascending shares of the backbone's blocks after which a head reads; of 30 blocks, the 14th, 22nd and 30th."""
    registers: int = 1
    """Learned tokens of a head, which gather what it needs from the whole video."""

    def __post_init__(self) -> None:
        if not self.depths or any(a >= b for a, b in pairwise(self.depths)):
            raise ValueError(f"depths={self.depths} must ascend")
        if self.depths[0] <= 0 or self.depths[-1] > 1:
            raise ValueError(f"depths={self.depths} must lie in (0, 1]")
        if self.registers < 1:
            raise ValueError(f"registers={self.registers} must be at least 1")

    def layers(self, num_layers: int) -> list[int]:
        """Indices of the blocks read, of ``num_layers``; ValueError if two depths fall on the same block."""
        layers = [max(0, round(depth * num_layers) - 1) for depth in self.depths]
        if len(set(layers)) < len(layers):
            raise ValueError(f"depths={self.depths} fall on blocks {layers} of {num_layers}; use fewer depths")
        return layers


class RegisterHead(nn.Module):
    """Register tokens gather the features of one depth by cross-attention; an MLP turns them into a logit."""

    def __init__(self, dim: int, num_heads: int, registers: int, eps: float) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(registers, dim) * dim**-0.5)
        self.norm = LayerNorm(dim, eps)
        self.attention = CrossAttention(dim, num_heads, eps)
        self.mlp = nn.Sequential(
            LayerNorm(registers * dim, eps), nn.Linear(registers * dim, dim), nn.SiLU(), nn.Linear(dim, 1)
        )

    def forward(self, features: Tensor, *, backend: AttentionBackend) -> Tensor:
        """[B F T C] -> [B] float32."""
        tokens = self.registers.expand(features.shape[0], 1, -1, -1)
        video = self.norm(features.to(tokens).flatten(1, 2))
        video = CachedText(*self.attention.key_value(video), None)
        tokens = tokens + self.attention(tokens, video, backend=backend)
        return self.mlp(tokens.flatten(1)).squeeze(1).float()


class Discriminator(nn.Module):
    """Tells real from generated noisy videos: a backbone, usually the critic's, and a head at each of its depths.

    Args:
        transformer: the backbone, shared (not copied): training the discriminator trains it too.
        config: depths and registers.
        generator: of the heads' initial weights.

    The heads are small and may stay in float32 over a backbone in half precision, which finite-difference penalties
    of their logits need.
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
        """Initialise the heads: Xavier matrices and logits that start at zero, so that they disturb nothing."""
        for head in self.heads:
            nn.init.normal_(head.registers, std=head.registers.shape[1] ** -0.5, generator=generator)
            for layer in head.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, generator=generator)
                    nn.init.zeros_(layer.bias)
            nn.init.zeros_(head.mlp[-1].weight)

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Logits [B K] float32, high for real, of noisy latents [B F C H W] at timesteps [B F], prompts [B L E]."""
        features = self.transformer.features(latents, timesteps, prompt_embeds, self.layers)
        # The heads may be in float32: a kernel that only takes half precision leaves their attention to sdpa.
        backend = self.transformer.resolved_backend(latents.device, features[0].dtype)
        logits = [head(x, backend=backend) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1)
