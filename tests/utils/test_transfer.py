"""A copy to a GPU uses pinned memory and does not wait."""

from unittest.mock import Mock

import torch
from torch import Tensor

from utils.transfer import send


def test_a_copy_to_a_gpu_is_pinned_and_does_not_wait():
    drawn = Mock(spec=Tensor, device=torch.device("cpu"), dtype=torch.float32)
    send(drawn, torch.device("cuda", 1), torch.bfloat16)
    drawn.to.assert_called_once_with(torch.bfloat16)  # rounded before the copy: half the bytes
    pinned = drawn.to.return_value.pin_memory.return_value
    pinned.to.assert_called_once_with(torch.device("cuda", 1), non_blocking=True)


def test_elsewhere_it_is_an_ordinary_copy():
    x = torch.arange(3.0)
    assert send(x, torch.device("cpu")) is x
    assert torch.equal(send(x, torch.device("cpu"), torch.bfloat16), x.bfloat16())
