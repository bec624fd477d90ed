"""Flow matching (rectified flow): the noise schedule and the algebra between x0, flow and noisy latents.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
Timesteps t run from 0 (clean) to 1000 (pure noise); the noise level is sigma = t / 1000 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TIMESTEP = 1000


def expand_sigma(timesteps: Tensor) -> Tensor:
    """Return the noise level sigma = t / 1000 of timesteps [B F], as [B F 1 1 1] float32 for broadcasting."""
    return (timesteps.float() / MAX_TIMESTEP)[..., None, None, None]


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """``x_t = (1 - sigma) x0 + sigma noise``.

    Args:
        x0, noise: [B F C H W].
        timesteps: [B F] in [0, 1000].
    """
    sigma = expand_sigma(timesteps).to(x0.device)
    return torch.lerp(x0.float(), noise.float(), sigma).to(x0.dtype)


def full_timesteps(timestep: float, latents: Tensor) -> Tensor:
    """Return one timestep for all frames of latents [B F ...]: [B 1] float32, filled on the device without a copy."""
    return torch.full((latents.shape[0], 1), timestep, dtype=torch.float32, device=latents.device)


def flow_to_x0(flow: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """``x0 = x_t - sigma v``, computed in float32. Latents are [B F C H W], timesteps [B F]."""
    sigma = expand_sigma(timesteps).to(noisy.device)
    return (noisy.float() - sigma * flow.float()).to(noisy.dtype)


def x0_to_flow(x0: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """``v = (x_t - x0) / sigma``, computed in float32. If sigma is 0, the flow is undefined and the result is 0."""
    sigma = expand_sigma(timesteps).to(noisy.device)
    flow = (noisy.float() - x0.float()) / sigma.clamp_min(1e-6)
    return torch.where(sigma > 0, flow, 0.0).to(noisy.dtype)


@dataclass(frozen=True)
class FlowMatching:
    """A timestep grid that ``shift`` warps towards noise (SD3, arXiv 2403.03206; Wan2.1 uses 5 at 480p)."""

    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be positive")

    def timestep(self, level: Tensor) -> Tensor:
        """Return the shifted timesteps ``1000 s u / (1 + (s - 1) u)`` of uniform levels u in [0, 1], any shape."""
        return MAX_TIMESTEP * self.shift * level / (1 + (self.shift - 1) * level)

    def level(self, timestep: float) -> float:
        """Return the uniform level u in [0, 1] whose shifted timestep is ``timestep``, in [0, 1000]."""
        sigma = timestep / MAX_TIMESTEP
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def grid(self, steps: int) -> Tensor:
        """Return the descending timesteps of ``steps`` solver steps, [steps] float32, without the final 0."""
        return self.timestep(1 - torch.arange(steps, dtype=torch.float64) / steps).float()

    def warp(self, steps: Sequence[float]) -> list[float]:
        """Look up a list of steps, such as 1000, 750, 500, 250, in the shifted 1000-step grid. 0 maps to 0."""
        levels = torch.tensor(list(steps), dtype=torch.float64).round() / MAX_TIMESTEP
        return self.timestep(levels).float().tolist()

    def training_weight(self, timesteps: Tensor) -> Tensor:
        """Return the bell-shaped weight ``exp(-2 ((t - 500) / 1000)^2)`` minus its minimum; its grid mean is 1."""
        grid = self.grid(MAX_TIMESTEP)
        lowest = _bell(grid).min()
        return (_bell(timesteps) - lowest).clamp_min(0) / (_bell(grid) - lowest).mean()


def _bell(timesteps: Tensor) -> Tensor:
    return torch.exp(-2 * ((timesteps - MAX_TIMESTEP / 2) / MAX_TIMESTEP) ** 2)
