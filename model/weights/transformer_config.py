"""Find the sizes of a transformer in the shapes of its tensors and in a config.json of any dialect."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from model.transformer import PRESETS, WanConfig
from model.weights.names import count_layers
from model.weights.paths import CONFIG_FILE, find_part
from utils.errors import UserError
from utils.side_files import check_schema, read_json

WAN_HEAD_DIM = 128
ADAPTER_PARTS = (".lora_", ".lokr_", ".hada_", ".oft_")
# diffusers' config.json → ours; the width is num_attention_heads * attention_head_dim.
DIFFUSERS_TO_WAN = {
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "patch_size": "patch_size",
    "eps": "eps",
    "prediction_type": "prediction_type",
    "text_len": "text_len",
}
UNKNOWN_TO_DIFFUSERS = ("prediction_type", "text_len")
"""Keys that diffusers does not have. They are written only if they differ from the values it assumes."""


Size = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Layers = Annotated[int, Field(strict=True, ge=1, le=2**12)]
TextLen = Annotated[int, Field(strict=True, ge=1, le=2**14)]


@dataclass
class WanFile:
    """The entries of a config.json in Wan's own format or in ours. Others are ignored."""

    model_type: str = "t2v"
    """Must be t2v."""
    dim: Size | None = None
    ffn_dim: Size | None = None
    num_heads: Size | None = None
    num_layers: Layers | None = None
    text_dim: Size | None = None
    text_len: TextLen | None = None
    freq_dim: Size | None = None
    in_dim: Size | None = None
    out_dim: Size | None = None
    patch_size: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    prediction_type: str | None = None

    def sizes(self) -> dict[str, object]:
        """What is stated, named as in `WanConfig`."""
        return {key: value for key, value in vars(self).items() if key != "model_type" and value is not None}


@dataclass
class DiffusersFile:
    """The entries of a config.json in diffusers' format. Others are ignored."""

    num_attention_heads: Size
    attention_head_dim: Size = WAN_HEAD_DIM
    num_layers: Layers | None = None
    ffn_dim: Size | None = None
    freq_dim: Size | None = None
    text_dim: Size | None = None
    text_len: TextLen | None = None
    in_channels: Size | None = None
    out_channels: Size | None = None
    patch_size: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    prediction_type: str | None = None

    def sizes(self) -> dict[str, object]:
        """What is stated, named as in `WanConfig`."""
        named = {ours: vars(self)[theirs] for theirs, ours in DIFFUSERS_TO_WAN.items()}
        dim = self.num_attention_heads * self.attention_head_dim
        return {"dim": dim, **{key: value for key, value in named.items() if value is not None}}


def read_transformer_config(path: str | Path, state: Mapping[str, Tensor], *, preset: str) -> WanConfig:
    """Return the sizes of the weights `state`.

    The shapes of tensors do not show the number of heads, the text length, eps and the prediction type. These come
    from a config.json in or beside `path`. If there is none, they come from a preset with the same sizes. If there is
    no such preset, they are Wan's values: heads of 128 and flow.

    Raises:
        UserError: the weights do not belong to a Wan transformer, or the sizes in config.json make no transformer. If
            the weights contradict config.json, this function does not notice; loading them raises the error.
    """
    sizes = _checked_sizes(state, path)
    declared = read_declared_config(path)
    if declared is None and (fit := fitting_preset(state, first=preset)):
        return PRESETS[fit]
    heads = {"num_heads": max(1, sizes["dim"] // WAN_HEAD_DIM)}
    try:
        return WanConfig(**(sizes | heads | (declared or {})))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its sizes do not make a transformer: {error}") from error


def read_declared_config(path: str | Path) -> dict[str, object] | None:
    """Return the sizes in the config.json in a folder or beside a file, named as in `WanConfig`.

    The formats of Wan, diffusers and this project are understood. Return None if there is no config.json of these.

    Raises:
        UserError: a value is impossible. The message names the key and the value.
    """
    path = find_part(path, "transformer")
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not file.is_file():
        return None
    values = {key: value for key, value in read_json(file, dict).items() if value is not None}
    if "num_attention_heads" in values:
        return check_schema(values, DiffusersFile, str(file)).sizes()
    if "dim" not in values:
        return None
    stated = check_schema(values, WanFile, str(file))
    if stated.model_type != "t2v":
        raise UserError(f"{file}: model_type={stated.model_type!r}; only t2v models are supported")
    return stated.sizes()


def infer_transformer_sizes(state: Mapping[str, Tensor]) -> dict[str, int | list[int]]:
    """Return the sizes of a Wan transformer from the shapes of its tensors, named as in `WanConfig`.

    The shapes do not show num_heads, text_len, eps and prediction_type.
    """
    ranks = {
        "patch_embedding.weight": 5,
        "head.head.weight": 2,
        "time_embedding.0.weight": 2,
        "text_embedding.0.weight": 2,
        "blocks.0.ffn.0.weight": 2,
    }
    for name, rank in ranks.items():
        if name not in state:
            raise UserError(f"not a Wan transformer: it has no tensor {name!r}")
        if state[name].ndim != rank:
            raise UserError(f"not a Wan transformer: {name!r} is {tuple(state[name].shape)}")
    patch, head, time, text, ffn = (tuple(state[name].shape) for name in ranks)
    return {
        "dim": patch[0],
        "num_layers": count_layers(state, "blocks"),
        "ffn_dim": ffn[0],
        "freq_dim": time[1],
        "text_dim": text[1],
        "in_dim": patch[1],
        "out_dim": head[0] // math.prod(patch[2:]),
        "patch_size": list(patch[2:]),
    }


def fitting_preset(state: Mapping[str, Tensor], *, first: str = "") -> str | None:
    """Return the preset with the sizes of the weights, or None. `first` is tried first."""
    sizes = infer_transformer_sizes(state)
    names = sorted(PRESETS, key=lambda name: name != first)
    return next((name for name in names if sizes.items() <= asdict(PRESETS[name]).items()), None)


def _checked_sizes(state: Mapping[str, Tensor], path: str | Path) -> dict:
    if any(part in key for key in state for part in ADAPTER_PARTS):
        raise UserError(f"{path}: is a LoRA, not a whole model; give it as generator.lora beside generator.weights")
    try:
        return infer_transformer_sizes(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def describe_sizes(state: Mapping[str, Tensor]) -> str:
    """Return the sizes that tell models apart as a text for messages."""
    sizes = infer_transformer_sizes(state)
    return ", ".join(f"{name}={sizes[name]}" for name in ("dim", "ffn_dim", "num_layers"))
