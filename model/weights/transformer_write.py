"""Write a transformer in each published format."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from model.transformer import WanConfig
from model.weights.mapping import StateDict
from model.weights.names import COMFYUI_PREFIX, wan_to_diffusers
from model.weights.transformer_config import DIFFUSERS_TO_WAN, UNKNOWN_TO_DIFFUSERS
from model.weights.write import SHARD_BYTES, convert, save_folder, save_safetensors, save_torch
from utils.errors import UserError

log = logging.getLogger(__name__)

WAN_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Format:
    """A format and its function `write(path, state, config, dtype, shard_bytes)`."""

    write: Callable[[Path, StateDict, WanConfig, torch.dtype | None, int], None]
    suffix: str
    """The ending that a path must have. "": the path is a folder."""
    keeps_config: bool
    """Whether the number of heads, the text length, eps and the prediction type are written too."""


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
        UserError: the path does not have the ending of the format.
    """
    path, kind = Path(path), FORMATS[format]
    if path.suffix != kind.suffix and (kind.suffix or path.suffix in (".pt", ".pth", ".safetensors")):
        raise UserError(f"{path}: the format {format} is a {f'file *{kind.suffix}' if kind.suffix else 'folder'}")
    if not kind.keeps_config and config.prediction_type != "flow":
        log.warning("the format %s cannot store that this model predicts %s", format, config.prediction_type)
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
        **{theirs: ours[name] for theirs, name in DIFFUSERS_TO_WAN.items() if name not in UNKNOWN_TO_DIFFUSERS},
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }
    assumed = {field.name: field.default for field in fields(WanConfig)}
    values |= {name: ours[name] for name in UNKNOWN_TO_DIFFUSERS if ours[name] != assumed[name]}
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
