"""The denoiser: a transformer and the meaning of its output, as flow and as x0.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L text tokens, E text dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model.attention import BlockMask
from model.flow_matching import FlowMatching, flow_to_x0, x0_to_flow
from model.kv_cache import KVCache
from model.transformer import WanTransformer


class Prediction(NamedTuple):
    """What a denoiser says of noisy latents, twice: both [B F C H W]."""

    flow: Tensor
    x0: Tensor


class Denoiser(nn.Module):
    """A :class:`WanTransformer` under a flow-matching schedule."""

    def __init__(self, transformer: WanTransformer, schedule: FlowMatching) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        block_mask: BlockMask | None = None,
    ) -> Prediction:
        """Arguments as :meth:`WanTransformer.forward`; x0 and flow are converted in float32."""
        output = self.transformer(
            latents, timesteps, prompt_embeds, cache=cache, start_frame=start_frame, block_mask=block_mask
        )
        if self.transformer.config.prediction_type == "x0":
            return Prediction(x0_to_flow(output, latents, timesteps), output)
        return Prediction(output, flow_to_x0(output, latents, timesteps))
