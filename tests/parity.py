"""Helpers for tests of the core: tiny denoisers, and the recordings of the official code in the folder PARITY_DATA."""

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.denoiser import Denoiser, Prediction
from model.flow_matching import FlowMatching, flow_to_x0
from model.transformer import WanConfig, WanTransformer

needs_recordings = pytest.mark.skipif(
    "PARITY_DATA" not in os.environ, reason="PARITY_DATA is not set: no recordings to compare with"
)

RECORDED = WanConfig(dim=64, num_heads=2, num_layers=3, ffn_dim=128, freq_dim=32, text_dim=48, text_len=16)
TINY = WanConfig(
    dim=32, num_heads=2, num_layers=2, ffn_dim=64, freq_dim=16, text_dim=8, text_len=5, in_dim=4, out_dim=4
)


class OfficialDenoiser(Denoiser):
    """A denoiser with two properties of the official code that this project does not have on purpose.

    It converts flow to x0 with the nearest of 1000 noise levels in a table (shifted by `table_shift`). In a context
    pass, the latents have the last noise level of the table, but the network gets timestep 0.
    """

    table_shift = 5.0

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, **options) -> Prediction:
        table = FlowMatching(self.table_shift).grid(1000)
        tabled = table[(table - timesteps[..., None]).abs().argmin(dim=-1)]
        told = timesteps.where(timesteps > last_level(self.schedule), 0.0)
        flow = self.transformer(latents, told, prompt_embeds, **options)
        wanted = slice(latents.shape[1] - flow.shape[1], None)  # none of them in a context pass
        return Prediction(flow, flow_to_x0(flow, latents[:, wanted], tabled))


class OfficialScore(OfficialDenoiser):
    """A score model of the official code. It always converts with the table of shift 8."""

    table_shift = 8.0


def last_level(schedule: FlowMatching) -> float:
    """Return the lowest timestep of the official table. The official code uses it instead of 0."""
    return schedule.grid(1000)[-1].item()


@cache
def _loader():
    spec = importlib.util.spec_from_file_location("parity_load", Path(os.environ["PARITY_DATA"]) / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_case


def load_case(name: str) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the metadata of a recorded case."""
    return _loader()(name)


def recorded_denoiser(weights: str = "generator", *, shift: float = 5.0, kind: type[Denoiser] = Denoiser) -> Denoiser:
    """Return a denoiser with the recorded weights "generator", "real" or "fake"."""
    transformer = WanTransformer(RECORDED)
    state, _ = load_case(f"weights_{weights}")
    transformer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return kind(transformer, FlowMatching(shift))


def tiny_denoiser(config: WanConfig = TINY, *, seed: int = 0) -> Denoiser:
    """Return a denoiser with random weights. None is zero, so every parameter matters."""
    transformer = WanTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "modulation" not in name else 0.2
            parameter.normal_(std=scale, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return Denoiser(transformer, FlowMatching(5.0))


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference divided by the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the parameters that have one, and remove them from the parameters."""
    taken = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return taken
