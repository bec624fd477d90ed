"""Weights that are stored in fewer bits. Each one is unpacked when it is used.

A `PackedTensor` has the shape of the unpacked weight and can be in a state dict beside ordinary tensors. Any operation
on it computes with the unpacked values in float32. `unpack` returns them as an ordinary tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

PLAIN_DTYPE = torch.bfloat16  # of an unpacked weight, unless another dtype is asked for


class PackedTensor(Tensor):
    """A weight of `shape` whose values are computed from stored tensors.

    Attributes:
        stored: the tensors in the file, memory-mapped.
        read: computes the float32 values [shape].
    """

    stored: tuple[Tensor, ...]
    read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], stored: tuple[Tensor, ...], read: Callable[[], Tensor]) -> "PackedTensor":
        packed = Tensor._make_wrapper_subclass(cls, shape, dtype=PLAIN_DTYPE, device="cpu")
        packed.stored, packed.read = stored, read
        return packed

    def __repr__(self) -> str:
        return f"PackedTensor(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} cannot write into a packed tensor; unpack it first")
        args, kwargs = tree_map(lambda value: value.read() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def unpack(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an ordinary tensor: `tensor` itself, or its unpacked values in `dtype` (None: bfloat16)."""
    return tensor.read().to(dtype or PLAIN_DTYPE) if isinstance(tensor, PackedTensor) else tensor
