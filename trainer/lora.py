"""Low-rank training: small matrices beside frozen linear layers, added to a model from outside.

Letters: r rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.transformer import WanTransformer
from model.weights.lora import LoRA, LowRank, merge_lora
from utils.bounds import NOT_NEGATIVE, POSITIVE, require

DOWN, UP, ALPHA = "lora_down", "lora_up", "lora_alpha"


@dataclass
class LoRAConfig:
    """Which weights learn, and in how many dimensions."""

    rank: int = 0
    """Of the learned differences; 0 trains the whole network."""
    alpha: float | None = None
    """The differences count alpha / rank times; null is rank, that is once."""
    layers: list[str] = field(default_factory=lambda: ["self_attn", "cross_attn", "ffn"])
    """Parts of a block whose linear layers learn."""

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "rank")
        require(self, POSITIVE, "alpha")


def add_lora(transformer: WanTransformer, config: LoRAConfig, generator: torch.Generator) -> None:
    """Freeze a transformer and give its blocks' linear layers trainable low-rank differences, zero at first.

    The layers keep their names: in a state dict the new tensors stand beside ``weight`` and ``bias``.

    Raises:
        ValueError: no layer is called so.
    """
    transformer.requires_grad_(False)
    chosen = [
        layer
        for name, layer in transformer.blocks.named_modules()
        if isinstance(layer, nn.Linear) and set(name.split(".")) & set(config.layers)
    ]
    if not chosen:
        raise ValueError(f"layers={config.layers} name no linear layer of a block")
    for layer in chosen:
        down = torch.randn(config.rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        up = torch.zeros(layer.out_features, config.rank)
        layer.register_parameter(DOWN, nn.Parameter(down.to(layer.weight)))
        layer.register_parameter(UP, nn.Parameter(up.to(layer.weight)))
        layer.register_buffer(ALPHA, torch.tensor(config.alpha or float(config.rank)))
        layer.register_forward_hook(_AddDifference((config.alpha or config.rank) / config.rank))


@dataclass(frozen=True)
class _AddDifference:
    """A forward hook: the layer's output and that of its difference."""

    scale: float

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.add(output, F.linear(F.linear(arguments[0], layer.lora_down), layer.lora_up), alpha=self.scale)


def take_lora(state: dict[str, Tensor]) -> LoRA:
    """Take the low-rank tensors out of a state dict; what is left is that of the frozen network."""
    lora = LoRA()
    for key in [key for key in state if key.endswith(f".{DOWN}")]:
        name = key.removesuffix(f".{DOWN}")
        down, up, alpha = (state.pop(f"{name}.{part}") for part in (DOWN, UP, ALPHA))
        lora.layers[name] = LowRank(down, up, alpha.item() / len(down))
    return lora


def merge(state: dict[str, Tensor]) -> LoRA:
    """Replace low-rank differences in a state dict by weights that contain them; returns them."""
    lora = take_lora(state)
    merge_lora(state, lora)
    return lora
