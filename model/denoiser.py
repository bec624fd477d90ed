"""The denoiser: a transformer and the meaning of its output, as flow and as x0.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L text tokens, E text dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model.flow_matching import FlowMatching, flow_to_x0, x0_to_flow
from model.transformer import WanTransformer


class Prediction(NamedTuple):
    """The prediction of a denoiser in two forms, x0 and flow, each [B F C H W]."""

    flow: Tensor
    x0: Tensor


class Denoiser(nn.Module):
    """A :class:`WanTransformer` with a flow-matching schedule."""

    def __init__(self, transformer: WanTransformer, schedule: FlowMatching) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, **options) -> Prediction:
        """Predict x0 and flow. The arguments are those of :meth:`WanTransformer.forward`. Conversion is in float32."""
        output = self.transformer(latents, timesteps, prompt_embeds, **options)
        latents = latents[:, latents.shape[1] - output.shape[1] :]
        if timesteps.shape[1] > 1:
            timesteps = timesteps[:, timesteps.shape[1] - output.shape[1] :]
        if self.transformer.config.prediction_type == "x0":
            return Prediction(x0_to_flow(output, latents, timesteps), output)
        return Prediction(output, flow_to_x0(output, latents, timesteps))
