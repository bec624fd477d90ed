"""The sizes of a transformer: from the shapes of its tensors and from every dialect of config.json."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor

from model.transformer import PRESETS, WanConfig
from model.weights.names import count_layers
from model.weights.paths import CONFIG_FILE, find_part, read_config
from utils.errors import UserError

WAN_HEAD_DIM = 128
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


def transformer_config(path: str | Path, state: Mapping[str, Tensor], *, preset: str) -> WanConfig:
    """Sizes of the weights `state`, with what tensors do not show (heads, text length, eps, prediction) from a
    config.json in or beside `path`, or a preset of the same sizes, or Wan's own: heads of 128, flow.

    Sizes that config.json states are taken as stated: weights that contradict them do not fit and are refused.
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
    """What the config.json in a folder, or beside a file, says of a transformer, named as in `WanConfig`.

    Original Wan, diffusers and our own are understood; None where there is none or, beside a file, one of another kind.
    """
    path = find_part(path, "transformer")
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG_FILE).is_file():
        return None
    file, values = folder / CONFIG_FILE, read_config(folder)
    values = {key: value for key, value in values.items() if value is not None}
    is_diffusers = "num_attention_heads" in values
    if not is_diffusers and "dim" not in values:
        return None
    sizes = {field.name for field in fields(WanConfig) if field.type == "int"}
    names = {theirs: ours for theirs, ours in DIFFUSERS_TO_WAN.items() if theirs in values}
    for key in values.keys() & {*sizes, "attention_head_dim", *(theirs for theirs in names if names[theirs] in sizes)}:
        if type(values[key]) is not int or values[key] < 1:
            raise UserError(f"{file}: {key}={values[key]!r} is not a positive whole number")
    eps, patch = values.get("eps", 1e-6), values.get("patch_size", [1, 2, 2])
    if type(eps) is not float or not 0 < eps < 1:
        raise UserError(f"{file}: eps={eps!r} is not a number between 0 and 1")
    if not isinstance(patch, list) or len(patch) != 3 or any(type(size) is not int or size < 1 for size in patch):
        raise UserError(f"{file}: patch_size={patch!r} is not three positive whole numbers")
    if values.get("model_type", "t2v") != "t2v":
        raise UserError(f"{file}: model_type={values['model_type']!r}; only t2v models are supported")
    if is_diffusers:
        dim = values["num_attention_heads"] * values.get("attention_head_dim", WAN_HEAD_DIM)
        return {"dim": dim, **{ours: values[theirs] for theirs, ours in names.items()}}
    known = {field.name for field in fields(WanConfig)}
    return {key: value for key, value in values.items() if key in known}


def infer_transformer_sizes(state: Mapping[str, Tensor]) -> dict[str, int | list[int]]:
    """Sizes of a Wan transformer, read off its tensors' shapes and named as in `WanConfig`.

    num_heads, text_len, eps and prediction_type leave no trace in the shapes.
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
    """The preset whose sizes are those of the weights; `first` is tried first."""
    sizes = infer_transformer_sizes(state)
    names = sorted(PRESETS, key=lambda name: name != first)
    return next((name for name in names if sizes.items() <= asdict(PRESETS[name]).items()), None)


def _checked_sizes(state: Mapping[str, Tensor], path: str | Path) -> dict:
    if any(".lora_" in key for key in state):
        raise UserError(f"{path}: is a LoRA, not a whole model; give it as generator.lora beside generator.weights")
    try:
        return infer_transformer_sizes(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def describe_sizes(state: Mapping[str, Tensor]) -> str:
    sizes = infer_transformer_sizes(state)
    return ", ".join(f"{name}={sizes[name]}" for name in ("dim", "ffn_dim", "num_layers"))
