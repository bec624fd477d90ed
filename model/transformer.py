"""The Wan2.1 diffusion transformer: one class for bidirectional, masked and cached (causal) use.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L text tokens, E text dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionBackend, BlockMask
from model.kv_cache import KeyValue, KVCache
from model.layers import Block, Head, sinusoidal_embedding
from model.rope import rotary_table


@dataclass
class WanConfig:
    """Sizes of a transformer, named as in Wan's own config.json."""

    dim: int
    """Model width."""
    ffn_dim: int
    """Width of the feed-forward layer."""
    num_heads: int
    """Attention heads; ``dim / num_heads`` is the head dim, even and at least 6."""
    num_layers: int
    """Transformer blocks."""
    text_dim: int = 4096
    """Width of the text encoder's output."""
    text_len: int = 512
    """Text tokens; shorter prompts are padded with zeros."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    in_dim: int = 16
    """Latent channels in."""
    out_dim: int = 16
    """Latent channels out."""
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent frames, rows and columns of a token."""
    eps: float = 1e-6
    """Of every norm."""
    prediction_type: str = "flow"
    """What the network's output means: "flow" (Wan) or "x0"."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} is not an even multiple of num_heads={self.num_heads}")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size={self.patch_size}: a token spans one latent frame, so it starts with 1")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even")
        if self.prediction_type not in ("flow", "x0"):
            raise ValueError(f"prediction_type={self.prediction_type!r} must be 'flow' or 'x0'")


PRESETS: dict[str, WanConfig] = {
    "shapes": WanConfig(
        dim=128, ffn_dim=512, num_heads=4, num_layers=5, text_dim=64, text_len=16, freq_dim=64, prediction_type="x0"
    ),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}


class WanTransformer(nn.Module):
    """Predicts from noisy latents, a timestep for every frame, and a prompt.

    - neither cache nor mask: bidirectional (teacher, critic);
    - ``block_mask``: block-causal or teacher-forcing training over whole clips;
    - ``cache``: causal generation, chunk by chunk.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, tuple(config.patch_size)
        patch_area = patch[0] * patch[1] * patch[2]
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers)
        )
        self.head = Head(dim, patch_area * config.out_dim, config.eps)
        self.gradient_checkpointing = False
        self.attention_backend = AttentionBackend.auto

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from nothing: Xavier matrices, zero biases, a head that starts at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(parameter, std=self.config.dim**-0.5, generator=generator)
            elif parameter.ndim == 1:
                nn.init.constant_(parameter, 1.0 if ".norm" in name and name.endswith("weight") else 0.0)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name.startswith("head"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            latents: noisy latents [B F C H W]; H and W are multiples of the patch.
            timesteps: [B F] in [0, 1000].
            prompt_embeds: [B L E], L at most ``text_len``.
            cache: keys and values of earlier frames; this pass adds its own.
            start_frame: absolute index of the first frame, for rotary positions and the cache.
            block_mask: which frames see which; its positions replace ``start_frame``.

        Returns:
            flow (or x0, as ``config.prediction_type`` says) [B F C H W].

        Raises:
            ValueError: a cache and a mask together, or sizes that do not fit.
        """
        last = len(self.blocks) - 1
        embedding, (x,) = self._backbone(
            latents, timesteps, prompt_embeds, [last], cache=cache, start_frame=start_frame, block_mask=block_mask
        )
        _, rows, columns = self.config.patch_size
        return rearrange(
            self.head(x, embedding),
            "b f (h w) (p q c) -> b f c (h p) (w q)",
            h=latents.shape[3] // rows,
            p=rows,
            q=columns,
        )

    def features(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """Hidden states [B F T C] after each of the blocks ``layers`` (ascending), every frame seeing every other.

        T are the tokens of a frame, C the model dim; the other arguments are those of :meth:`forward`.
        """
        return self._backbone(latents, timesteps, prompt_embeds, layers)[1]

    def _backbone(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        layers: Sequence[int],
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        block_mask: BlockMask | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Time embedding [B F C], and hidden states after each of the blocks ``layers``."""
        self._check(latents, prompt_embeds, cache, block_mask)
        frames, height, width = (
            size // patch
            for size, patch in zip((latents.shape[1], *latents.shape[3:]), self.config.patch_size, strict=True)
        )
        x = self.patch_embedding(rearrange(latents, "b f c h w -> b c f h w"))
        x = rearrange(x, "b c f h w -> b f (h w) c")
        embedding = self.time_embedding(sinusoidal_embedding(timesteps, self.config.freq_dim).to(x))
        modulation = self.time_projection(embedding).unflatten(-1, (6, -1))
        positions = block_mask.positions if block_mask else tuple(range(start_frame, start_frame + frames))
        head_dim = self.config.dim // self.config.num_heads
        rotary = rotary_table(positions, height, width, head_dim, x.device)

        kept = []
        for layer, (block, text) in enumerate(zip(self.blocks, self._text(prompt_embeds, cache), strict=True)):
            x = self._run(
                block,
                x,
                modulation,
                text,
                rotary,
                mask=block_mask,
                cache=cache,
                layer=layer,
                start_frame=start_frame,
                backend=self.attention_backend,
            )
            if layer in layers:
                kept.append(x)
        return embedding, kept

    def _run(self, block: nn.Module, *args, **kwargs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, **kwargs)
        return block(*args, **kwargs)

    def _text(self, prompt_embeds: Tensor, cache: KVCache | None) -> list[Tensor | KeyValue]:
        """What each block's cross-attention reads: embedded text under grad, else keys and values kept in the cache."""
        if cache is None or torch.is_grad_enabled():
            return [self._embed_text(prompt_embeds)] * len(self.blocks)

        def compute() -> list[KeyValue]:
            text = self._embed_text(prompt_embeds)
            return [block.cross_attn.key_value(text) for block in self.blocks]

        return cache.text(prompt_embeds, compute)

    def _embed_text(self, prompt_embeds: Tensor) -> Tensor:
        padding = self.config.text_len - prompt_embeds.shape[1]
        padded = nn.functional.pad(prompt_embeds, (0, 0, 0, padding))
        return self.text_embedding(padded.to(self.text_embedding[0].weight.dtype))

    def _check(
        self, latents: Tensor, prompt_embeds: Tensor, cache: KVCache | None, block_mask: BlockMask | None
    ) -> None:
        config = self.config
        _, rows, columns = config.patch_size
        if cache is not None and block_mask is not None:
            raise ValueError("give a cache (generation) or a block_mask (training), not both")
        if latents.shape[2] != config.in_dim:
            raise ValueError(f"latents {tuple(latents.shape)} have {latents.shape[2]} channels, not {config.in_dim}")
        if latents.shape[3] % rows or latents.shape[4] % columns:
            raise ValueError(f"latents {tuple(latents.shape)} do not divide into patches of {rows}x{columns}")
        if prompt_embeds.shape[1] > config.text_len or prompt_embeds.shape[2] != config.text_dim:
            raise ValueError(
                f"prompt_embeds {tuple(prompt_embeds.shape)} do not fit text_len={config.text_len}, "
                f"text_dim={config.text_dim}"
            )
        if block_mask is not None and len(block_mask.positions) != latents.shape[1]:
            raise ValueError(f"block_mask is for {len(block_mask.positions)} frames, latents have {latents.shape[1]}")
