"""The Wan2.1 diffusion transformer: one class for bidirectional, masked and cached (causal) use.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L text tokens, E text dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import AttentionBackend, BlockMask, FlexMask, flex_mask, resolve_backend
from model.kv_cache import CachedText, KVCache
from model.layer_cache import ChunkSlots, KeyLayout
from model.layers import GELU, Block, BlockStack, Head, PatchEmbedding, sinusoidal_embedding
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
    """The epsilon of every norm."""
    prediction_type: str = "flow"
    """The meaning of the network's output: "flow" (Wan) or "x0"."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} is not an even multiple of num_heads={self.num_heads}")
        if self.patch_size[0] != 1:
            raise ValueError(
                f"patch_size={self.patch_size}: it must start with 1, because a token spans one latent frame"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even")
        if self.prediction_type not in ("flow", "x0"):
            raise ValueError(f"prediction_type={self.prediction_type!r} must be 'flow' or 'x0'")


SHAPES = WanConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=5,
    text_dim=64,
    text_len=16,
    freq_dim=64,
    in_dim=48,
    out_dim=48,
    prediction_type="x0",
)
PRESETS: dict[str, WanConfig] = {
    "shapes": SHAPES,
    "shapes-rich": replace(SHAPES, text_len=24),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}


FOLDED_MULTIPLE = 16
"""The number of text keys is a multiple of this, so that prompts of similar length have keys of equal shape."""


class WanTransformer(nn.Module):
    """Predicts flow or x0 from noisy latents, a timestep for every frame, and a prompt.

    - neither cache nor mask: bidirectional (teacher, critic);
    - ``block_mask``: block-causal or teacher-forcing training over whole clips;
    - ``cache``: causal generation, chunk by chunk.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, tuple(config.patch_size)
        patch_area = patch[0] * patch[1] * patch[2]
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), GELU(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = BlockStack(
            Block(dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers)
        )
        self.head = Head(dim, patch_area * config.out_dim, config.eps)
        self.gradient_checkpointing = False
        self.attention_backend = AttentionBackend.auto
        self.cached_heads = config.num_heads
        """The number of heads whose keys the cache of this process stores."""
        self.static_cache = False
        """True if caches are made for compiled passes."""

    def run_with(self, *, gradient_checkpointing: bool, attention: AttentionBackend) -> None:
        """Choose how passes run: whether backward recomputes the blocks, and the kernel of attention."""
        self.gradient_checkpointing, self.attention_backend = gradient_checkpointing, attention

    def use_static_cache(self) -> None:
        """Make caches for compiled passes from now on."""
        self.static_cache = True

    def cache_heads(self, count: int) -> None:
        """Store the keys of `count` heads in the caches of this process, because others store the rest."""
        self.cached_heads = count

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training without weights: Xavier matrices, zero biases, a head that starts at zero."""
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
        start_frame: int | Sequence[int] = 0,
        chunk_frames: Sequence[int] | None = None,
        output_frames: int | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Predict the flow or x0 (see ``config.prediction_type``): [B output_frames C H W].

        Args:
            latents: noisy latents [B F C H W]; H and W are multiples of the patch.
            timesteps: [B F] in [0, 1000], or [B 1] for all frames.
            prompt_embeds: [B L E], L at most ``text_len``.
            cache: keys and values of earlier frames. This pass adds its own.
            start_frame: absolute index of the first frame. If the cache joins several samples, one for each sample.
            chunk_frames: sizes of several chunks in one pass over a cache. Each sees itself and earlier chunks.
            output_frames: how many of the last frames to predict, in whole chunks. None: all. 0: only fill the cache.
            block_mask: which frames see each other. Its positions replace ``start_frame``. ValueError with a cache.
        """
        self._check(latents, timesteps, prompt_embeds, cache, block_mask)
        x, embedding = self._embed(latents, timesteps)
        chunks = self._open(cache, x, start_frame, chunk_frames, fill=output_frames == 0)
        (x,) = self.blocks(
            x,
            self.time_projection(embedding).unflatten(-1, (6, -1)),
            self._text(prompt_embeds, cache),
            self._rotary(latents, start_frame, block_mask),
            mask=self._mask(block_mask, x),
            caches=[None] * len(self.blocks) if cache is None else cache.layers,
            chunks=chunks,
            output_frames=latents.shape[1] if output_frames is None else output_frames,
            **self._options(x, [len(self.blocks) - 1]),
        )
        return self._predict(x, embedding, latents)

    def features(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """Return hidden states [B F T C] after each block in ``layers`` (ascending). All frames see each other.

        T: tokens of a frame, C: model dim. The other arguments are those of :meth:`forward`.
        """
        self._check(latents, timesteps, prompt_embeds, None, None)
        x, embedding = self._embed(latents, timesteps)
        return self.blocks(
            x,
            self.time_projection(embedding).unflatten(-1, (6, -1)),
            self._text(prompt_embeds, None),
            self._rotary(latents, 0, None),
            mask=None,
            caches=[None] * len(self.blocks),
            chunks=(),
            output_frames=latents.shape[1],
            **self._options(x, layers),
        )

    def _embed(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of the latents [B F T C] and embedded timesteps [B f C]."""
        x = self.patch_embedding(latents)
        return x, self.time_embedding(sinusoidal_embedding(timesteps, self.config.freq_dim).to(x))

    def _options(self, x: Tensor, kept: Sequence[int]) -> dict[str, Any]:
        """Return the options of the blocks for hidden states x. ``kept``: the blocks whose output is returned."""
        return {
            "backend": self.resolved_backend(x.device, x.dtype),
            "kept": kept,
            "checkpointing": self.gradient_checkpointing and torch.is_grad_enabled(),
        }

    def _predict(self, x: Tensor, embedding: Tensor, latents: Tensor) -> Tensor:
        """Turn hidden states [B f T C] of the last f frames into predictions [B f C H W], as large as ``latents``."""
        if x.shape[1] == 0:
            return latents[:, :0]
        patches = self.head(x, embedding if embedding.shape[1] == 1 else embedding[:, -x.shape[1] :])
        _, rows, columns = self.config.patch_size
        height, width = latents.shape[3] // rows, latents.shape[4] // columns
        return rearrange(patches, "b f (h w) (p q c) -> b f c (h p) (w q)", h=height, w=width, p=rows, q=columns)

    def resolved_backend(self, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        """Return the attention kernel for passes of this dtype. UserError if the chosen kernel cannot run."""
        return resolve_backend(self.attention_backend, device, dtype)

    def _mask(self, block_mask: BlockMask | None, x: Tensor) -> BlockMask | FlexMask | None:
        """Return the mask in the form for the device of hidden states x [B F T C]. It is made once for all blocks."""
        if block_mask is None or not x.is_cuda:
            return block_mask
        return flex_mask(block_mask, x.shape[2], x.device)

    def _rotary(self, latents: Tensor, start_frame: int | Sequence[int], block_mask: BlockMask | None) -> Tensor:
        """Return cosines and sines of every token (see :func:`model.rope.rotary_table`), if needed per sample."""
        _, rows, columns = self.config.patch_size
        height, width = latents.shape[3] // rows, latents.shape[4] // columns
        head_dim = self.config.dim // self.config.num_heads
        starts = [start_frame] if isinstance(start_frame, int) else start_frame
        tables = [
            rotary_table(
                block_mask.positions if block_mask else tuple(range(start, start + latents.shape[1])),
                height,
                width,
                head_dim,
                latents.device,
            )
            for start in starts
        ]
        return tables[0] if len(tables) == 1 else torch.stack(tables)

    def _open(
        self,
        cache: KVCache | None,
        x: Tensor,
        start_frame: int | Sequence[int],
        chunk_frames: Sequence[int] | None,
        *,
        fill: bool,
    ) -> tuple[ChunkSlots, ...]:
        """Return the slots of each chunk of hidden states x [B F T C]; none without a cache.

        ``fill``: the pass only fills the cache. Under grad, the cache then keeps the autograd graph.
        """
        if cache is None:
            return ()
        keep_graph = fill and torch.is_grad_enabled()
        head_dim = self.config.dim // self.config.num_heads
        layout = KeyLayout(x.shape[0], x.shape[2], self.cached_heads, head_dim, x.dtype, x.device, self.static_cache)
        ends = list(accumulate(chunk_frames or (x.shape[1],)))
        if ends[-1] != x.shape[1]:
            raise ValueError(f"chunk_frames={list(chunk_frames)} do not add up to the {x.shape[1]} frames of the pass")
        chunks = [
            cache.open(layout, _later(start_frame, start), end - start, keep_graph=keep_graph)
            for start, end in reversed(list(pairwise([0, *ends])))  # the last first, so that the buffers hold all
        ]
        return tuple(reversed(chunks))

    def _text(self, prompt_embeds: Tensor, cache: KVCache | None) -> list[Tensor | CachedText]:
        """Return the prompt for each block: embedded text (no cache, or under grad), else cached keys and values."""
        if cache is None or torch.is_grad_enabled():
            return [self._embed_text(prompt_embeds)] * len(self.blocks)

        def compute() -> list[CachedText]:
            text, bias = self._fold_padding(prompt_embeds, self._embed_text(prompt_embeds))
            return [CachedText(*block.cross_attn.key_value(text), bias) for block in self.blocks]

        return cache.text(prompt_embeds, compute)

    def _fold_padding(self, prompt_embeds: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drop most padded tokens of embedded text [B L C]. Also returns a bias for the logits, [B 1 1 L] or None.

        Padded tokens are all equal. So m of them, with ``log(n / m)`` added to their logits, equal n of them. Half
        precision would round this logarithm, so nothing is dropped there.
        """
        if text.dtype != torch.float32:
            return text, None
        lengths = (
            (prompt_embeds != 0).any(2).mul(torch.arange(1, prompt_embeds.shape[1] + 1, device=text.device)).amax(1)
        )
        kept = FOLDED_MULTIPLE * (int(lengths.max()) // FOLDED_MULTIPLE + 1)
        if kept >= text.shape[1]:
            return text, None
        padded = torch.arange(kept, device=text.device) >= lengths[:, None]
        copies = (text.shape[1] - lengths) / (kept - lengths)
        bias = torch.where(padded, copies.log()[:, None], 0.0).to(text.dtype)
        return text[:, :kept].contiguous(), bias[:, None, None]

    def _embed_text(self, prompt_embeds: Tensor) -> Tensor:
        padding = self.config.text_len - prompt_embeds.shape[1]
        padded = nn.functional.pad(prompt_embeds, (0, 0, 0, padding))
        return self.text_embedding(padded.to(self.text_embedding[0].weight.dtype))

    def _check(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        cache: KVCache | None,
        block_mask: BlockMask | None,
    ) -> None:
        config = self.config
        _, rows, columns = config.patch_size
        if cache is not None and block_mask is not None:
            raise ValueError("give a cache (generation) or a block_mask (training), not both")
        if timesteps.shape[1] not in (1, latents.shape[1]):
            raise ValueError(
                f"timesteps {tuple(timesteps.shape)} have another number of frames than latents {tuple(latents.shape)}"
            )
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
            raise ValueError(
                f"block_mask is for {len(block_mask.positions)} frames, but latents have {latents.shape[1]}"
            )


def _later(start_frame: int | Sequence[int], frames: int) -> int | tuple[int, ...]:
    return start_frame + frames if isinstance(start_frame, int) else tuple(start + frames for start in start_frame)
