"""LoRA: low-rank weight differences, read as peft, diffusers and Kohya write them, merged, unmerged, saved for peft.

Letters: r rank, I inputs and O outputs of a layer.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from model.weight_files import not_found, read_file, read_json, read_metadata
from model.weight_writers import save_folder
from model.weights import WAN_TO_DIFFUSERS, StateDict, check_finite, strip_wrappers
from utils.errors import UserError

# What a folder may hold: peft's name, then diffusers'.
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"

PREFIX = re.compile(r"(base_model\.)?(transformer\.)?(lora_unet_|lora_transformer_)?")
KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
DIFFERENCES = {"diff": "weight", "diff_b": "bias"}
# A layer, what of it, perhaps the adapter's name, perhaps .weight: blocks.0.self_attn.q.lora_A.default.weight
TENSOR = re.compile(rf"(?P<layer>.+?)\.(?P<kind>{'|'.join([*KINDS, *DIFFERENCES])})(\.(?!bias)\w+)?(\.weight)?")


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


def load_lora(path: str | Path) -> LoRA:
    """Read a LoRA: a peft or diffusers folder, a .safetensors, or a PyTorch file such as LongLive's lora.pt.

    Raises:
        UserError: one line naming the file, for anything missing, damaged, incomplete or without a place in a
            text-to-video Wan transformer.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path)
    if path.is_dir():
        file = next((path / name for name in LORA_FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"{path}: holds neither {' nor '.join(LORA_FILES)}")
        path = file
    state = strip_wrappers(read_file(path, key="generator_lora"), source=str(path))
    config = _read_scales(path)
    lora = LoRA()
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: the tensor {key!r} is stored as {tensor.dtype}; use a LoRA in float or bfloat16")
        check_finite(tensor, f"{path}: the tensor {key!r}")
        match = TENSOR.fullmatch(PREFIX.sub("", key, count=1))
        if match is None:
            raise UserError(f"{path}: the tensor {key!r} {tuple(tensor.shape)} is none of a LoRA this reader knows")
        name, kind = match["layer"], match["kind"]
        if kind in DIFFERENCES:
            lora.full[f"{_our_name(name, path)}.{DIFFERENCES[kind]}"] = tensor
        else:
            layers.setdefault(name, {})[KINDS[kind]] = tensor
    for name, parts in layers.items():
        lora.layers[_our_name(name, path)] = _low_rank(name, parts, config, path)
    return lora


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
    save_folder(folder, state, config, name=LORA_FILES[0], config_file=PEFT_CONFIG)


def _read_scales(path: Path) -> dict:
    """What stands beside the tensors about their scale, in peft's terms; empty where alpha is the rank or a tensor."""
    if (path.parent / PEFT_CONFIG).is_file() and path.name == LORA_FILES[0]:
        return read_json(path.parent / PEFT_CONFIG)
    if path.suffix != ".safetensors" or not (text := read_metadata(path).get(DIFFUSERS_METADATA)):
        return {}
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: its metadata {DIFFUSERS_METADATA} cannot be read ({error})") from None


def _low_rank(name: str, parts: Mapping[str, Tensor], config: Mapping, path: Path) -> LowRank:
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise UserError(f"{path}: {name} has but one of its two matrices; the file is incomplete")
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down):
        raise UserError(f"{path}: {name}: the matrices {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
    rank = len(down)
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = value
    if "alpha" in parts:
        alpha = parts["alpha"].item()
    return LowRank(down, up, alpha / (rank**0.5 if config.get("use_rslora") else rank))


@cache
def _layer_patterns() -> tuple[tuple[re.Pattern, str], ...]:
    """How files call a layer → our name for it: with our or diffusers' names, and dots or (Kohya) underscores."""
    layers = [(ours[:-2], theirs[:-2]) for ours, theirs in WAN_TO_DIFFUSERS if ours.endswith(".*")]
    return tuple(
        (re.compile(re.escape(spelled).replace(r"\*", r"(\d+)")), ours.replace("*", "{}"))
        for ours, theirs in layers
        for name in (ours, theirs)
        for spelled in (name, name.replace(".", "_"))
    )


def _our_name(name: str, path: Path) -> str:
    for pattern, ours in _layer_patterns():
        if match := pattern.fullmatch(name):
            return ours.format(*match.groups())
    raise UserError(f"{path}: the layer {name!r} has no place in a text-to-video Wan transformer")
