"""Read a LoRA as peft, diffusers, Kohya and ComfyUI write it."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from model.weights.fit import check_finite
from model.weights.lora import PEFT_CONFIG, PEFT_WEIGHTS, LoRA, LowRank
from model.weights.names import WAN_TO_DIFFUSERS, strip_wrappers
from model.weights.paths import not_found, read_json
from model.weights.read import read_file
from model.weights.safetensors_file import read_metadata
from utils.errors import UserError

# What a folder may hold: peft's name, then diffusers'.
LORA_FILES = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")
DIFFUSERS_METADATA = "lora_adapter_metadata"
PREFIX = re.compile(r"(base_model\.)?(transformer\.)?(lora_unet_|lora_transformer_)?")
KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
DIFFERENCES = {"diff": "weight", "diff_b": "bias"}
# A layer, what of it, perhaps the adapter's name, perhaps .weight: blocks.0.self_attn.q.lora_A.default.weight
TENSOR = re.compile(rf"(?P<layer>.+?)\.(?P<kind>{'|'.join([*KINDS, *DIFFERENCES])})(\.(?!bias)\w+)?(\.weight)?")


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
