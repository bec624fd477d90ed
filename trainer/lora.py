"""Low-rank training (LoRA): adds small trainable matrices to the frozen linear layers of an existing model.

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
    """Which layers learn a low-rank difference, and of which rank."""

    rank: int = 0
    """Rank of the learned differences; 0 trains the whole network."""
    alpha: float | None = None
    """The learned differences are multiplied by alpha / rank; null is the rank, which multiplies them by 1."""
    layers: list[str] = field(default_factory=lambda: ["self_attn", "cross_attn", "ffn"])
    """Parts of a block whose linear layers learn."""

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "rank")
        require(self, POSITIVE, "alpha")


def add_lora(transformer: WanTransformer, config: LoRAConfig, generator: torch.Generator) -> None:
    """Freeze a transformer and add trainable low-rank differences, zero at first, to linear layers of its blocks.

    The layers keep their names. In a state dict the new tensors have names beside ``weight`` and ``bias``.

    Raises:
        ValueError: ``config.layers`` names no linear layer.
    """
    transformer.requires_grad_(False)
    chosen = [
        layer
        for name, layer in transformer.blocks.named_modules()
        if isinstance(layer, nn.Linear) and set(name.split(".")) & set(config.layers)
    ]
    if not chosen:
        raise ValueError(f"layers={config.layers} match no linear layer of a block")
    for layer in chosen:
        down = torch.randn(config.rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        up = torch.zeros(layer.out_features, config.rank)
        layer.register_parameter(DOWN, nn.Parameter(down.to(layer.weight)))
        layer.register_parameter(UP, nn.Parameter(up.to(layer.weight)))
        layer.register_buffer(ALPHA, torch.tensor(config.alpha or float(config.rank)))
        layer.register_forward_hook(_AddDifference((config.alpha or config.rank) / config.rank))


@dataclass(frozen=True)
class _AddDifference:
    """A forward hook that adds the output of the difference to the output of the layer."""

    scale: float

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.add(output, F.linear(F.linear(arguments[0], layer.lora_down), layer.lora_up), alpha=self.scale)


def take_lora(state: dict[str, Tensor]) -> LoRA:
    """Remove the low-rank tensors from a state dict and return them. The tensors of the frozen network stay."""
    lora = LoRA()
    for key in [key for key in state if key.endswith(f".{DOWN}")]:
        name = key.removesuffix(f".{DOWN}")
        down, up, alpha = (state.pop(f"{name}.{part}") for part in (DOWN, UP, ALPHA))
        lora.layers[name] = LowRank(down, up, alpha.item() / len(down))
    return lora


def merge(state: dict[str, Tensor]) -> LoRA:
    """Merge the low-rank differences of a state dict into its weights, and return them."""
    lora = take_lora(state)
    merge_lora(state, lora)
    return lora
