"""A Wan transformer's files: the sizes its tensors show, every dialect of config.json, and a writer for each format."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from model.transformer import PRESETS, WanConfig, WanTransformer
from model.weight_files import CONFIG_FILE, read_config
from model.weight_writers import SHARD_BYTES, convert, save_folder, save_safetensors, save_torch
from model.weights import (
    COMFYUI_PREFIX,
    StateDict,
    check_fit,
    count_layers,
    find_part,
    load_into,
    load_state_dict,
    wan_to_diffusers,
)
from utils.errors import UserError

log = logging.getLogger(__name__)

WAN_HEAD_DIM = 128
WAN_FILE = "diffusion_pytorch_model.safetensors"

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
}


def read_transformer(
    path: str | Path,
    *,
    preset: str,
    use_ema: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> WanTransformer:
    """A transformer from weights in any format, of any size.

    Args:
        preset: which preset to try first where no config.json says what tensors cannot.
        use_ema: see `load_state_dict`.
        dtype: None keeps the stored one.

    Raises:
        UserError: weights that are missing, damaged, not finite, or not those of a text-to-video Wan transformer, or
            that a config.json beside them contradicts.
    """
    model, state = open_transformer(path, preset=preset, use_ema=use_ema)
    load_into(model, state, source=str(path), dtype=dtype, device=device)
    return model


def open_transformer(path: str | Path, *, preset: str, use_ema: bool | None = None) -> tuple[WanTransformer, StateDict]:
    """A transformer without values (on the meta device) and the memory-mapped weights that fit it; see above."""
    state = load_state_dict(path, use_ema=use_ema)
    config = transformer_config(path, state, preset=preset)
    if config.num_layers > 2 * len(state):  # building such a model would take for ever
        raise UserError(
            f"{path}: its config.json says num_layers={config.num_layers}; the weights have {_describe(state)}"
        )
    try:
        with torch.device("meta"):
            model = WanTransformer(config)
    except RuntimeError as error:
        raise UserError(f"{path}: the sizes in its config.json are beyond any model: {error}") from error
    fit = fitting_preset(state)
    hint = f"; the weights are those of the preset {fit}" if fit else f"; the weights have {_describe(state)}"
    check_fit(model, state, source=str(path), hint=hint)
    return model, state


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


def _describe(state: Mapping[str, Tensor]) -> str:
    sizes = infer_transformer_sizes(state)
    return ", ".join(f"{name}={sizes[name]}" for name in ("dim", "ffn_dim", "num_layers"))


@dataclass(frozen=True)
class Format:
    """How a format is written: `write(path, state, config, dtype, shard_bytes)`."""

    write: Callable[[Path, StateDict, WanConfig, torch.dtype | None, int], None]
    suffix: str
    """What a path must end in; "" is a folder."""
    keeps_config: bool
    """Whether heads, text length, eps and prediction type are written too."""


def write_transformer(
    path: str | Path,
    state: StateDict,
    config: WanConfig,
    *,
    format: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a transformer in one of `FORMATS`.

    Raises:
        UserError: the path does not suit the format.
    """
    path, kind = Path(path), FORMATS[format]
    if path.suffix != kind.suffix and (kind.suffix or path.suffix in (".pt", ".pth", ".safetensors")):
        raise UserError(f"{path}: the format {format} is a {f'file *{kind.suffix}' if kind.suffix else 'folder'}")
    if not kind.keeps_config and config.prediction_type != "flow":
        log.warning("the format %s does not say that this model predicts %s", format, config.prediction_type)
    kind.write(path, state, config, dtype, shard_bytes)


def _write_wan(path: Path, state: StateDict, config: WanConfig, dtype: torch.dtype | None, shard_bytes: int) -> None:
    values = {"_class_name": "WanModel", "model_type": "t2v", **asdict(config)}
    save_folder(path, state, values, dtype=dtype, name=WAN_FILE, shard_bytes=shard_bytes)


def _write_diffusers(
    path: Path, state: StateDict, config: WanConfig, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    ours = asdict(config)
    values = {
        "_class_name": "WanTransformer3DModel",
        **{theirs: ours[name] for theirs, name in DIFFUSERS_TO_WAN.items() if name != "prediction_type"},
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }
    if config.prediction_type != "flow":  # diffusers knows no other
        values["prediction_type"] = config.prediction_type
    folder = path / "transformer"
    save_folder(folder, wan_to_diffusers(state), values, dtype=dtype, name=WAN_FILE, shard_bytes=shard_bytes)


def _write_official(
    path: Path, state: StateDict, config: WanConfig, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    prefixed = {f"model.{key}": convert(tensor, dtype) for key, tensor in state.items()}
    save_torch(path, {"generator": prefixed, "generator_ema": prefixed})  # the same tensors are stored once


def _write_comfyui(
    path: Path, state: StateDict, config: WanConfig, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    save_safetensors(path, {f"{COMFYUI_PREFIX}{key}": tensor for key, tensor in state.items()}, dtype=dtype)


def _write_safetensors(
    path: Path, state: StateDict, config: WanConfig, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    save_safetensors(path, state, dtype=dtype)


FORMATS: dict[str, Format] = {
    "wan": Format(_write_wan, "", keeps_config=True),
    "official": Format(_write_official, ".pt", keeps_config=False),
    "diffusers": Format(_write_diffusers, "", keeps_config=True),
    "comfyui": Format(_write_comfyui, ".safetensors", keeps_config=False),
    "safetensors": Format(_write_safetensors, ".safetensors", keeps_config=False),
}
