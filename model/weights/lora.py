"""LoRA: low-rank differences of weights; merge them into weights, take them out again, save them for peft.

Letters: r rank, I inputs and O outputs of a layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.weights.mapping import StateDict
from model.weights.write import save_folder
from utils.errors import UserError

# The files of a peft folder, and the prefix of its tensors.
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """The difference ``scale * up @ down`` of one layer's weight."""

    down: Tensor
    """[r I] or, of a convolution, [r I ...]."""
    up: Tensor
    """[O r] or [O r 1 ...]."""
    scale: float
    """alpha / r."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it belongs to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def difference(self) -> Tensor:
        """In float32 and the weight's shape."""
        return (self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))).view(self.shape)


@dataclass
class LoRA:
    """Differences to a transformer's weights, under original Wan names."""

    layers: dict[str, LowRank] = field(default_factory=dict)
    """Layer name, such as blocks.0.self_attn.q → the difference of its weight."""
    full: StateDict = field(default_factory=dict)
    """Parameter name → a difference of full rank; some files bring these for biases and norms."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape of its difference."""
        shapes = {f"{name}.weight": layer.shape for name, layer in self.layers.items()}
        return shapes | {name: tuple(tensor.shape) for name, tensor in self.full.items()}

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """Parameter names and their differences in float32, one at a time."""
        for name, layer in self.layers.items():
            yield f"{name}.weight", layer.difference()
        for name, tensor in self.full.items():
            yield name, tensor.float()


def merge_lora(weights: Mapping[str, Tensor], lora: LoRA, scale: float = 1.0, *, source: str = "LoRA") -> None:
    """Add `scale` times the differences to `weights` in place: computed in float32, rounded once to the weight's dtype.

    Args:
        weights: a state dict, or ``dict(module.named_parameters())``.

    Raises:
        UserError: a tensor that is not among the weights or has another shape there; the weights are left alone.
    """
    for name, shape in lora.shapes().items():
        given = tuple(weights[name].shape) if name in weights else "missing"
        if shape != given:
            raise UserError(f"{source}: does not fit the weights: {name} (LoRA: {shape}, weights: {given})")
    with torch.no_grad():
        for name, difference in lora.differences():
            weight = weights[name]
            weight.copy_(weight.float() + scale * difference.to(weight.device))


def unmerge_lora(weights: Mapping[str, Tensor], lora: LoRA, scale: float = 1.0) -> None:
    """Undo `merge_lora` with the same scale, up to the rounding of each weight's dtype."""
    merge_lora(weights, lora, -scale)


def save_lora(folder: str | Path, lora: LoRA) -> None:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: differences of full rank, which peft's format has no place for.
    """
    if lora.full:
        raise UserError(f"{folder}: peft's format has no place for full differences such as {min(lora.full)!r}")
    ranks = {name: len(layer.down) for name, layer in lora.layers.items()}
    alphas = {name: layer.scale * ranks[name] for name, layer in lora.layers.items()}
    rank, alpha = (max(values.values(), default=1) for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(lora.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    state = {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": tensor
        for name, layer in lora.layers.items()
        for letter, tensor in (("A", layer.down), ("B", layer.up))
    }
    save_folder(folder, state, config, name=PEFT_WEIGHTS, config_file=PEFT_CONFIG)
