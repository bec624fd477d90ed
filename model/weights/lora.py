"""LoRA and similar adapters are differences of a transformer's weights. Merge them into weights or save them for peft.

Letters: r rank, I inputs and O outputs of a layer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.weights.adapters import Adapter, LowRank, Replacement, Whole
from model.weights.packed import PackedTensor, unpack
from model.weights.write import save_folder
from utils.errors import UserError

log = logging.getLogger(__name__)

# The files of a peft folder, and the prefix of its tensors.
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
IMAGE_INPUT = "patch_embedding.weight"  # an image-to-video model has more input channels
NAMED = 3  # how many layers a message names


@dataclass
class LoRA:
    """Differences of a transformer's weights, under original Wan names."""

    layers: dict[str, Adapter] = field(default_factory=dict)
    """Layer name, such as blocks.0.self_attn.q -> the difference of its weight."""
    full: dict[str, Whole | Replacement] = field(default_factory=dict)
    """Parameter name -> its difference. Files use this for biases, norms and modulations."""
    source: str = "LoRA"
    """The file, for messages."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Layers that a text-to-video model does not have, by the name in the file -> what they belong to."""

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Yield parameter names and their adapters."""
        for name, adapter in self.layers.items():
            yield f"{name}.weight", adapter
        yield from self.full.items()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape of its difference."""
        return {name: adapter.shape for name, adapter in self.adapters()}

    def differences(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield parameter names and their differences in float32, one at a time.

        DoRA and new values need `weights`, because they depend on the weight that they change.
        """
        for name, adapter in self.adapters():
            yield name, adapter.difference(None if weights is None else weights[name].detach().float())

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor and scale under its own name. Together they identify this LoRA."""
        return dict(_tensors(dict(self.adapters())))


def merge_lora(weights: dict[str, Tensor], lora: LoRA, scale: float = 1.0, *, source: str | None = None) -> None:
    """Add `scale` times the differences of one LoRA to `weights` in place. See :func:`merge_loras`."""
    merge_loras(weights, [(lora if source is None else _named(lora, source), scale)])


def merge_loras(weights: dict[str, Tensor], loras: Sequence[tuple[LoRA, float]]) -> None:
    """Add the scaled differences of several LoRAs to `weights` in place.

    All differences are computed in float32 from the weights without any of them, so their order does not matter. Each
    weight is rounded once. A LoRA for image-to-video models gives one warning that names the layers left out.

    Args:
        weights: a state dict, or ``dict(module.named_parameters())``.
        loras: pairs of a LoRA and its scale. 1 is as trained, 0 changes nothing, a negative scale subtracts it.

    Raises:
        UserError: a tensor is not among the weights or has another shape there. The weights are then unchanged.
    """
    changes: dict[str, list[tuple[LowRank | Whole, float]]] = {}
    for lora, scale in loras:
        for name, adapter in _fitting(weights, lora):
            changes.setdefault(name, []).append((adapter, scale))
    with torch.no_grad():
        for name, adapters in changes.items():
            weight = weights[name]
            before = unpack(weight, torch.float32).detach().float()
            after = before
            for adapter, scale in adapters:
                difference = adapter.difference(before.cpu())
                after = after + scale * difference.view_as(weight).to(weight.device)
            if isinstance(weight, PackedTensor):
                weights[name] = after.to(weight.dtype)
            else:
                weight.copy_(after)


def save_lora(folder: str | Path, lora: LoRA) -> None:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: the LoRA holds something other than low-rank matrices of linear layers.
    """
    others = {name: part.kind for name, part in lora.layers.items() if not isinstance(part, LowRank)}
    others |= {name: part.kind for name, part in lora.full.items()}
    if others:
        name = min(others)
        raise UserError(
            f"{folder}: a peft LoRA has no place for the {others[name]} of {name!r}; "
            "merge it into the weights with --lora instead"
        )
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


def _named(lora: LoRA, source: str) -> LoRA:
    return LoRA(lora.layers, lora.full, source, lora.left_out)


def _fitting(weights: Mapping[str, Tensor], lora: LoRA) -> Iterator[tuple[str, LowRank | Whole]]:
    """Yield the adapters that belong to `weights`. Warn about the others if they belong to another kind of model."""
    left_out, fitting = dict(lora.left_out), []
    for name, adapter in lora.adapters():
        given = tuple(weights[name].shape) if name in weights else "missing"
        if given != "missing" and _same_values(adapter.shape, given):
            fitting.append((name, adapter))
        elif name == IMAGE_INPUT and lora.left_out:
            left_out[name.removesuffix(".weight")] = "image-to-video"
        else:
            raise UserError(
                f"{lora.source}: does not fit the weights: {name} (LoRA: {adapter.shape}, weights: {given})"
            )
    if left_out and not fitting:
        raise UserError(f"{lora.source}: holds nothing for a text-to-video Wan transformer; use another LoRA")
    if left_out:
        named = ", ".join(list(left_out)[:NAMED]) + (", ..." if len(left_out) > NAMED else "")
        purposes = " and ".join(sorted(set(left_out.values())))
        log.warning(
            "%s: ignored %d layers for %s models, which this model does not have (%s); the other %d are merged",
            lora.source,
            len(left_out),
            purposes,
            named,
            len(fitting),
        )
    return iter(fitting)


def _same_values(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a difference fits a weight. A kernel may be flattened into the inputs; leading 1s are ignored."""
    flat = (weight[0], torch.Size(weight[1:]).numel()) if len(weight) > 2 else weight
    return shape in (weight, flat) or _without_leading_ones(shape) == _without_leading_ones(weight)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if not shape or shape[0] != 1 else _without_leading_ones(shape[1:])


def _tensors(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if value is None:
        return
    if isinstance(value, Tensor | float | int):
        yield prefix, torch.as_tensor(value)
        return
    parts = vars(value) if not isinstance(value, dict | tuple) else value
    items = enumerate(parts) if isinstance(parts, tuple) else parts.items()
    for name, part in items:
        yield from _tensors(part, f"{prefix}.{name}" if prefix else str(name))
