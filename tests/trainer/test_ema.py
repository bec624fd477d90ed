"""The exponential moving average of parameters."""

import pytest
import torch
from torch import nn

from trainer.ema import EMA


def net(value: float) -> nn.Linear:
    module = nn.Linear(2, 2)
    set_to(module, value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)


def test_the_average_follows_its_formula():
    module = net(1.0)
    ema = EMA(module, 0.9)
    for step, value in enumerate((2.0, 4.0), start=1):
        set_to(module, value)
        ema.update(step)
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 4.0
    assert all(torch.allclose(average, torch.tensor(expected)) for average in ema.state_dict().values())
    assert set(ema.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("decay", "start", "steps", "share"),
    [(0.99, 0, 40, 0.669), (0.99, 40, 120, 0.448), (0.99, 0, 120, 0.299), (0.99, 0, 231, 0.098), (0.0, 0, 40, 0.0)],
)
def test_an_average_that_remembers_its_beginning_is_warned_about(caplog, decay, start, steps, share):
    """The share of the first weights in an average is decay^steps. A warning names it if it is above 0.1."""
    ema = EMA(net(1.0), decay, start)
    ema.warn_if_young(steps)
    set_to(ema.module, 1.0)
    for step in range(1, steps + 1):
        if step > start:
            set_to(ema.module, 0.0)
        ema.update(step)
    assert ema.state_dict()["bias"][0].item() == pytest.approx(share, abs=2e-3)
    assert ema.initial_share(steps) == pytest.approx(share, abs=2e-3)
    told = [record.getMessage() for record in caplog.records]
    assert (f"{100 * share:.0f} % of the averaged weights are still those of step {start}" in " ".join(told)) == (
        share > 0.1
    )


def test_until_its_first_step_the_average_copies():
    module = net(1.0)
    ema = EMA(module, 0.5, start_step=2)
    for step, value, expected in ((1, 3.0, 3.0), (2, 7.0, 7.0), (3, 9.0, 8.0)):
        set_to(module, value)
        ema.update(step)
        assert torch.equal(ema.state_dict()["bias"], torch.full((2,), expected))


def test_updating_leaves_the_trained_weights_alone():
    module = net(1.0)
    ema = EMA(module, 0.5)
    set_to(module, 3.0)
    ema.update(1)
    assert torch.equal(module.bias, torch.full((2,), 3.0))


def test_applied_puts_the_average_in_and_the_trained_weights_back_even_after_an_error():
    module = net(1.0)
    ema = EMA(module, 0.5)
    set_to(module, 3.0)
    optimised = [id(parameter) for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), ema.applied():
        assert torch.equal(module(torch.ones(2)), torch.full((2,), 3.0))
        raise RuntimeError("on purpose")
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 9.0))
    assert [id(parameter) for parameter in module.parameters()] == optimised


def test_a_restored_average_equals_the_saved_one_and_keeps_its_own_memory():
    first, second = EMA(net(1.0), 0.5), EMA(net(2.0), 0.5)
    second.load_state_dict(first.state_dict())
    set_to(first.module, 5.0)
    first.update(1)
    assert torch.equal(second.state_dict()["weight"], torch.ones(2, 2))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay="):
        EMA(net(1.0), decay)
