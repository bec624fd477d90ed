"""A denoiser gives its prediction in two forms, whichever of them its network outputs."""

from dataclasses import replace

import pytest
import torch

from model.flow_matching import expand_sigma
from tests.parity import TINY, random, relative_error, tiny_denoiser

TIMESTEPS = torch.tensor([[1000.0, 625.0], [300.0, 40.0]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flow", "x0"])
def test_flow_and_x0_agree_and_one_of_them_is_the_output(kind):
    denoiser = tiny_denoiser(replace(TINY, prediction_type=kind))
    noisy, embeds = random(2, 2, 4, 4, 6), random(2, 5, 8, seed=1)
    prediction = denoiser(noisy, TIMESTEPS, embeds)
    assert torch.equal(getattr(prediction, kind), denoiser.transformer(noisy, TIMESTEPS, embeds))
    assert relative_error(prediction.x0 + expand_sigma(TIMESTEPS) * prediction.flow, noisy) <= 1e-6


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        replace(TINY, prediction_type="epsilon")
