"""The files of the text encoder: UMT5 weights from any release, and sizes from config.json or tensor shapes.

Letters: D embedding channels, L tokens of a prompt with its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from model.tokenizer import find_tokenizer, load_tokenizer, load_transformers
from model.weights import CONFIG_FILE, StateDict, count_layers, find_part, load_into, load_state_dict, not_found
from model.weights.packed import unpack
from utils.errors import UserError
from utils.side_files import check_schema, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WAN_TEXT_LEN = 512
MAX_TEXT_LEN = 2**14

Size = Annotated[int, Field(strict=True, ge=1, le=2**20)]


@dataclass
class EncoderFile:
    """The entries of a UMT5 config.json that are used, with the names of transformers. Other entries are ignored."""

    model_type: str = ""
    """Must be umt5."""
    text_len: Annotated[int, Field(strict=True, ge=1, le=MAX_TEXT_LEN)] = WAN_TEXT_LEN
    """The number of tokens L to which a prompt is padded or cut."""
    vocab_size: Size | None = None
    d_model: Size | None = None
    d_kv: Size | None = None
    d_ff: Size | None = None
    num_layers: Size | None = None
    num_heads: Size | None = None
    relative_attention_num_buckets: Size | None = None
    relative_attention_max_distance: Size | None = None
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None
    feed_forward_proj: str | None = None

    def sizes(self) -> dict[str, int | float | str]:
        """Return the stated entries that UMT5Config of transformers accepts."""
        own = ("model_type", "text_len")
        return {key: value for key, value in vars(self).items() if key not in own and value is not None}


class EncoderSizes(NamedTuple):
    """The sizes of a prompt's embedding."""

    dim: int
    """D."""
    text_len: int
    """L."""


class LoadedEncoder(NamedTuple):
    """The parts of a text encoder."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    text_len: int


def read_encoder(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadedEncoder:
    """Read a UMT5 encoder and its tokenizer; see `TextEncoder.from_files`."""
    path = find_part(path, "text_encoder")
    if not path.exists():
        raise not_found(path)
    declared = _read_config(path)
    state, source = load_state_dict(path), str(path)
    config = _infer_config(state, source) if declared is None else _stated_config(declared, state, source)
    words = load_tokenizer(find_tokenizer(path, tokenizer))
    model = _build_umt5(config, state, source=source, dtype=dtype, device=device)
    _check_vocabulary(model, words, source)
    return LoadedEncoder(model, words, text_len or (WAN_TEXT_LEN if declared is None else declared.text_len))


def read_text_len(path: Path) -> int:
    """Return the tokens L of a prompt: the value of config.json, else Wan's 512."""
    declared = _read_config(path)
    return WAN_TEXT_LEN if declared is None else declared.text_len


def read_sizes(path: Path) -> EncoderSizes:
    """Return the sizes of embeddings, from the shapes of the weights and config.json. No weight is read."""
    config = _infer_config(load_state_dict(path), str(path))
    return EncoderSizes(config.d_model, read_text_len(path))


def _read_config(path: Path) -> EncoderFile | None:
    """Read the config.json of an encoder's folder. None for a file of weights, or a folder without config.json."""
    file = path / CONFIG_FILE
    if not file.is_file():
        return None
    config = check_schema(read_json(file, dict), EncoderFile, str(file))
    if config.model_type != "umt5":
        raise UserError(f"{path}: config.json says model_type={config.model_type!r}; 'umt5' is needed")
    return config


def _stated_config(declared: EncoderFile, state: Mapping[str, Tensor], source: str) -> UMT5Config:
    layers = count_layers(state, "encoder.block")
    if declared.num_layers is not None and declared.num_layers > max(1, 2 * layers):  # building such a model takes long
        raise UserError(f"{source}: config.json says num_layers={declared.num_layers}, but the weights have {layers}")
    return load_transformers().UMT5Config(**declared.sizes(), dropout_rate=0.0)


def _infer_config(state: Mapping[str, Tensor], source: str) -> UMT5Config:
    """Infer a UMT5Config from the shapes of tensors that have the names of transformers."""
    first = "encoder.block.0.layer"
    names = (
        "shared.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    if absent := [name for name in names if name not in state]:
        raise UserError(f"{source}: not a UMT5 encoder: it has no tensor for {absent[0]!r}")
    if wrong := [name for name in names if state[name].ndim != 2]:
        raise UserError(f"{source}: not a UMT5 encoder: {wrong[0]!r} is {tuple(state[wrong[0]].shape)}")
    (vocab_size, dim), (inner, _), (buckets, heads), (ffn, _) = (state[name].shape for name in names)
    return load_transformers().UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn,
        num_layers=count_layers(state, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        dropout_rate=0.0,
    )


def _build_umt5(
    config: UMT5Config,
    state: StateDict,
    *,
    source: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None = None,
) -> UMT5EncoderModel:
    try:
        with torch.device("meta"):
            model = load_transformers().UMT5EncoderModel(config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{source}: the sizes in config.json do not make a text encoder: {error}") from None
    if "shared.weight" in state:  # files contain the tied embedding once
        embedding = unpack(state["shared.weight"], dtype).to(device, dtype)
        state["shared.weight"] = state["encoder.embed_tokens.weight"] = embedding
    load_into(model, state, source=source, dtype=dtype, device=device)
    model.set_input_embeddings(model.shared)  # assigning separated the two
    return model.eval()


def _check_vocabulary(model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Raise UserError if the tokenizer has ids for which the model has no embedding."""
    rows, ids = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if ids > rows:
        raise UserError(
            f"{source}: has embeddings for {rows} tokens, but the tokenizer has {ids}; use the encoder's own tokenizer"
        )
