"""Weights in 8 bits with a scale: value = stored * scale. Examples: ComfyUI's scaled fp8, LightX2V's fp8 and int8.

`X.weight` is float8 or int8. Its scale is one number, one number for each row, or one number for each block.
"""

from functools import partial

import torch
from torch import Tensor

from model.weights.mapping import StateDict
from model.weights.packed import PackedTensor
from utils.errors import UserError
from utils.side_files import parse_json

# Names beside `X.weight`: those of its scale, and those of the scale of the layer's input, which is not needed.
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
INPUT_SCALES = ("scale_input", "input_scale")
MARKERS = ("scaled_fp8",)
FORMAT = "comfy_quant"  # ComfyUI: a JSON text in uint8 that names the format
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8", "int8_tensorwise")
MAX_FORMAT_BYTES = 4096
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def apply_scales(state: StateDict, *, source: str) -> StateDict:
    """Turn scaled 8-bit weights into packed tensors. Drop markers and scales of inputs.

    Raises:
        UserError: a scale has no weight, does not fit it, or belongs to a format that cannot be read.
    """
    scales = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] in SCALES}
    rest = {key: tensor for key, tensor in state.items() if key not in scales and not _is_marker(key, tensor, source)}
    for key, scale in scales.items():
        name = f"{key.rpartition('.')[0]}.weight"
        if name not in rest:
            raise UserError(f"{source}: the scale {key!r} belongs to no weight; the file is incomplete")
        weight = rest[name]
        if weight.dtype in EIGHT_BITS:
            rest[name] = _packed(weight, scale, f"{source}: the scale {key!r}")
        elif weight.dtype is torch.uint8 or isinstance(weight, PackedTensor):
            raise UserError(
                f"{source}: the weight {name!r} is packed in fewer than 8 bits; use bfloat16 or fp8 weights"
            )
        elif not torch.equal(scale.float(), torch.ones_like(scale, dtype=torch.float32)):
            raise UserError(f"{source}: the weight {name!r} is {weight.dtype} and has a scale; use another file")
    return rest


def _is_marker(key: str, tensor: Tensor, source: str) -> bool:
    last = key.rpartition(".")[2]
    if last == FORMAT:
        text = bytes(tensor.flatten()[:MAX_FORMAT_BYTES].to(torch.uint8).tolist())
        name = parse_json(text, dict, f"{source}: {key!r}").get("format")
        if name not in KNOWN_FORMATS:
            raise UserError(
                f"{source}: {key!r} is in the format {str(name)[:60]}, which cannot be read; use bfloat16 or fp8"
            )
    return last in (*INPUT_SCALES, *MARKERS, FORMAT)


def _packed(weight: Tensor, scale: Tensor, name: str) -> PackedTensor:
    if not scale.is_floating_point() or not scale.float().isfinite().all():
        raise UserError(f"{name} holds values that are not finite numbers; use an undamaged file")
    fits = scale.numel() == 1 or (
        weight.ndim == 2
        and (
            scale.numel() == len(weight) if scale.ndim == 1 else scale.ndim == 2 and _divides(scale.shape, weight.shape)
        )
    )
    if not fits:
        raise UserError(f"{name} {tuple(scale.shape)} does not fit a weight {tuple(weight.shape)}; use another file")
    return PackedTensor(tuple(weight.shape), (weight, scale), partial(_scaled, weight, scale))


def _divides(blocks: torch.Size, shape: torch.Size) -> bool:
    """Return whether a grid of equal blocks covers the weight. The last blocks of a row or column may be smaller."""
    return all(0 < count <= size for count, size in zip(blocks, shape, strict=True))


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Return weight [O I] times a scale, which is one number, [O], [O 1], or [o i] for o x i blocks."""
    values, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    if scale.ndim == 1:
        return values.mul_(scale[:, None])
    for axis in (0, 1):
        block = -(-values.shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, values.shape[axis])
    return values.mul_(scale)
