"""Copies from the CPU to a GPU that do not stop the work already queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return x on ``device`` in ``dtype`` (None keeps its own).

    A copy from ordinary memory to a GPU waits until the GPU has done everything before it. From pinned memory it is
    queued like any other operation.
    """
    dtype = x.dtype if dtype is None else dtype
    if device.type == "cuda" and x.device.type == "cpu":
        return x.to(dtype).pin_memory().to(device, non_blocking=True)
    return x.to(device, dtype)
