"""Decides whether the kernels of :mod:`model.triton_kernels` can be used."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor


def can_fuse(x: Tensor) -> bool:
    """Return whether Triton kernels may be used for x: on an NVIDIA GPU, without grad, outside torch.compile."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None and torch.version.hip is None
