"""Differences of one layer's weight, as adapter files store them: LoRA, LoHa, LoKr, DoRA and whole tensors.

Every class computes its difference exactly, in float32. A new kind of adapter is a new class here, its parts in
`lora_dialects.PARTS` and a row of `lora_read.KINDS`.

Letters: r rank, I inputs and O outputs of a layer; a convolution has kernel sizes after I.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Adapter(Protocol):
    """The difference of one tensor of a model."""

    kind: str
    """The usual name of this kind."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference. A kernel may be flattened into the inputs."""

    def difference(self, weight: Tensor) -> Tensor:
        """Return the difference to add to `weight`, in float32.

        Args:
            weight: float32, in any shape with as many values.
        """


@dataclass(frozen=True)
class LowRank:
    """LoRA: ``scale * up @ down``; with `mid`, a Tucker decomposition of a convolution (Hu et al. 2021; LyCORIS)."""

    down: Tensor
    """[r I] or, of a convolution, [r I ...]; with `mid` [r I 1 ...]."""
    up: Tensor
    """[O r] or [O r 1 ...]."""
    scale: float
    """alpha / r."""
    mid: Tensor | None = None
    """[r r ...]: the kernel of a Tucker decomposition."""
    kind = "LoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def difference(self, weight: Tensor | None = None) -> Tensor:
        """Return ``scale * up @ down`` [O I ...]. It does not depend on the weight."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is not None:
            return self.scale * torch.einsum("or,rs...,si->oi...", up, self.mid.float(), down)
        return (self.scale * (up @ down)).view(self.shape)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: ``scale * (w1_a @ w1_b) * (w2_a @ w2_b)`` (FedPara, Hyeon-Woo et al. 2022; LyCORIS, peft)."""

    w1: tuple[Tensor, Tensor]
    """a [O r] and b [r I ...]; with Tucker kernels a [r O] and b [r I]."""
    w2: tuple[Tensor, Tensor]
    """As w1."""
    scale: float
    """alpha / r."""
    kernels: tuple[Tensor, Tensor] | None = None
    """Two Tucker kernels [r r ...] of a convolution."""
    kind = "LoHa"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        a, b = self.w1
        return (len(a), *b.shape[1:]) if self.kernels is None else (a.shape[1], b.shape[1], *self.kernels[0].shape[2:])

    def difference(self, weight: Tensor | None = None) -> Tensor:
        """Return the scaled product of both factors [O I ...]. It does not depend on the weight."""
        if self.kernels is None:
            first, second = (a.float() @ b.float().flatten(1) for a, b in (self.w1, self.w2))
        else:
            pairs = zip(self.kernels, (self.w1, self.w2), strict=True)
            first, second = (_tucker(kernel, a, b) for kernel, (a, b) in pairs)
        return (self.scale * first * second).view(self.shape)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: ``scale * kron(w1, w2)``; each factor is whole or a product (Yeh et al. 2024, LyCORIS; peft)."""

    w1: Tensor | tuple[Tensor, Tensor]
    """[o i], or its factors a [o r] and b [r i]."""
    w2: Tensor | tuple[Tensor, Tensor]
    """[p j ...] with O = o p and I = i j, or its factors a [p r] and b [r j ...]; with `kernel` a [r p] and b [r j]."""
    scale: float
    """alpha / r, or 1 if both factors are whole."""
    kernel: Tensor | None = None
    """[r r ...]: the Tucker kernel of w2."""
    kind = "LoKr"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        rows, columns = (len(self.w1), self.w1.shape[1]) if isinstance(self.w1, Tensor) else _outer(self.w1)
        inner = self._second_shape()
        return (rows * inner[0], columns * inner[1], *inner[2:])

    def difference(self, weight: Tensor | None = None) -> Tensor:
        """Return the scaled Kronecker product [O I ...]. It does not depend on the weight."""
        first = self.w1.float() if isinstance(self.w1, Tensor) else self.w1[0].float() @ self.w1[1].float()
        if isinstance(self.w2, Tensor):
            second = self.w2.float()
        elif self.kernel is not None:
            second = _tucker(self.kernel, *self.w2)
        else:
            second = (self.w2[0].float() @ self.w2[1].float().flatten(1)).view(self._second_shape())
        first = first.view(*first.shape, *[1] * (second.ndim - 2))
        return self.scale * torch.kron(first, second.contiguous())

    def _second_shape(self) -> tuple[int, ...]:
        if isinstance(self.w2, Tensor):
            return tuple(self.w2.shape)
        if self.kernel is None:
            return (len(self.w2[0]), *self.w2[1].shape[1:])
        return (self.w2[0].shape[1], self.w2[1].shape[1], *self.kernel.shape[2:])


@dataclass(frozen=True)
class Decomposed:
    """DoRA: the changed weight is scaled to a stored length: ``m (W + d) / |W + d|`` (Liu et al. 2024, equation 5).

    Lengths are those of rows [O 1 ...] (peft, LyCORIS with `wd_on_out`) or of columns [1 I ...] (older LyCORIS).
    """

    inner: LowRank | Hadamard | Kronecker
    """The difference d."""
    magnitude: Tensor
    """m: [O], [O 1 ...] or [1 I ...]."""
    kind = "DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.inner.shape

    def difference(self, weight: Tensor) -> Tensor:
        """Return the scaled weight minus `weight`, in the weight's shape."""
        changed = weight + self.inner.difference(weight).view_as(weight)
        of_rows = self.magnitude.ndim == 1 or self.magnitude.shape[0] == len(weight) != 1
        others = [axis for axis in range(weight.ndim) if axis != (0 if of_rows else 1)]
        lengths = torch.linalg.vector_norm(changed, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        return self.magnitude.float().view_as(lengths) / lengths * changed - weight

    def fits(self) -> bool:
        """Return whether there is one stored length for each row, or one for each column, of the weight."""
        rows, columns = self.shape[0], self.shape[1]
        if self.magnitude.numel() == 0 or self.magnitude.ndim not in (1, 2, len(self.shape), 5):
            return False
        if self.magnitude.ndim == 1 or self.magnitude.shape[0] == rows != 1:
            return self.magnitude.numel() == rows
        return self.magnitude.numel() == self.magnitude.shape[1] and columns % self.magnitude.numel() == 0


@dataclass(frozen=True)
class Whole:
    """A difference that is stored as a whole tensor. Files use this for biases, norms and modulations."""

    tensor: Tensor
    """In the shape of the parameter."""
    scale: float = 1.0
    """Factor of the tensor."""
    kind = "whole difference"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.tensor.shape)

    def difference(self, weight: Tensor | None = None) -> Tensor:
        """Return the scaled tensor. It does not depend on the weight."""
        return self.scale * self.tensor.float()


@dataclass(frozen=True)
class Replacement:
    """A new value for a parameter: peft's `modules_to_save` and trained biases, ComfyUI's `set_weight`."""

    tensor: Tensor
    """In the shape of the parameter."""
    kind = "new value"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.tensor.shape)

    def difference(self, weight: Tensor) -> Tensor:
        """Return the new value minus the old value."""
        return self.tensor.float() - weight


def _tucker(kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiply a Tucker decomposition: kernel [r r ...], a [r O], b [r I] -> [O I ...]."""
    return torch.einsum("rs...,ro,si->oi...", kernel.float(), a.float(), b.float())


def _outer(factors: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return len(factors[0]), factors[1].shape[1]
