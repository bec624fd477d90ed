"""Give a module its weights: check names, shapes and values first."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.weights.mapping import StateDict
from model.weights.packed import PackedTensor, unpack
from model.weights.read import load_state_dict
from utils.errors import UserError


def load_into(
    module: nn.Module,
    state: StateDict,
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Load the tensors of `state` into `module`. Names and shapes must match, and no second copy is made.

    Args:
        module: the module. Its parameters may be on the meta device.
        state: the tensors. It is emptied, so that the memory of each tensor is freed as soon as it is converted.
        source: the file they came from, for the error message.
        dtype: converts floating-point tensors one by one. None keeps their dtype. Packed tensors become bfloat16.
        device: the device to put them on. None leaves them where they are.

    Raises:
        UserError: tensors are missing, unexpected or of another shape (the message names three with both shapes), or
            a tensor holds NaN or infinity after it is converted to `dtype`.
    """
    check_fit(module, state, source=source)
    converted: StateDict = {}
    for key in list(state):
        tensor = unpack(state.pop(key), dtype)
        converted[key] = tensor.to(device or tensor.device, dtype if tensor.is_floating_point() else None)
        check_finite(converted[key], f"{source}: the tensor {key!r}")
    module.load_state_dict(converted, strict=True, assign=True)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str, hint: str = "") -> None:
    """Raise UserError if the names or shapes differ from those of `module`. The message names three such tensors.

    A tensor of integers in the place of a floating-point one is refused too.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = [
        f"{key} (file: {given.get(key, 'missing')}, model: {expected.get(key, 'not in it')})"
        for key in {**expected, **given}
        if given.get(key) != expected.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit {type(module).__name__}: {'; '.join(wrong[:3])}{more}{hint}")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise UserError(
                f"{source}: the tensor {key!r} is stored as {state[key].dtype}; use weights in float or bfloat16"
            )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise UserError if a tensor holds NaN or infinity. This needs no memory. 8-bit types are not checked."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.dtype.itemsize == 1:
        return
    low, high = tensor.detach().aminmax()
    if not (low.isfinite() & high.isfinite()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds NaN or infinity (as {dtype}); use an undamaged file")


def weights_hash(weights: Mapping[str, Tensor] | str | Path) -> str:
    """Return 12 hex digits that identify weights. Equal names, dtypes, shapes and values give equal digits.

    The file format does not matter. Only 16 evenly spaced blocks are read of a tensor above 256 KiB, so that 14B
    parameters take a second instead of a minute. The hash tells checkpoints apart. It does not prove that nobody
    changed them.
    """
    block, blocks = 16 * 1024, 16
    state = weights if isinstance(weights, Mapping) else load_state_dict(weights)
    digest = hashlib.sha256()
    for key in sorted(state):
        for tensor in state[key].stored if isinstance(state[key], PackedTensor) else (state[key].detach(),):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content = tensor.contiguous().reshape(-1).view(torch.uint8)
            step = max(block, (content.numel() - block) // (blocks - 1))
            for start in range(0, content.numel(), step):
                digest.update(content[start : start + block].cpu().numpy())
    return digest.hexdigest()[:12]
