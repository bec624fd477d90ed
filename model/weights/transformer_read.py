"""Read a transformer from weights in any format."""

from pathlib import Path

import torch

from model.transformer import WanTransformer
from model.weights.fit import check_fit, load_into
from model.weights.mapping import StateDict
from model.weights.read import load_state_dict
from model.weights.transformer_config import describe_sizes, fitting_preset, read_transformer_config
from utils.errors import UserError


def read_transformer(
    path: str | Path,
    *,
    preset: str,
    use_ema: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> WanTransformer:
    """Read a transformer of any size from weights in any format.

    Args:
        path: a folder or a file, as for `load_state_dict`.
        preset: the preset to try first if there is no config.json.
        use_ema: see `load_state_dict`.
        dtype: type of the weights. None keeps the stored type; packed weights become bfloat16.
        device: where the weights go.

    Raises:
        UserError: the weights are missing, damaged or not finite, do not belong to a text-to-video Wan transformer, or
            do not fit the config.json beside them.
    """
    model, state = open_transformer(path, preset=preset, use_ema=use_ema)
    load_into(model, state, source=str(path), dtype=dtype, device=device)
    return model


def open_transformer(path: str | Path, *, preset: str, use_ema: bool | None = None) -> tuple[WanTransformer, StateDict]:
    """Return a transformer without values (on the meta device) and the memory-mapped weights that fit it.

    Arguments and errors are those of :func:`read_transformer`.
    """
    state = load_state_dict(path, use_ema=use_ema)
    config = read_transformer_config(path, state, preset=preset)
    if config.num_layers > len(state):  # building such a model would take very long
        raise UserError(
            f"{path}: config.json says num_layers={config.num_layers}, but the weights have {describe_sizes(state)}"
        )
    try:
        with torch.device("meta"):
            model = WanTransformer(config)
    except RuntimeError as error:
        raise UserError(f"{path}: the sizes in its config.json are too large for any model: {error}") from error
    fit = fitting_preset(state)
    hint = f"; the weights are those of the preset {fit}" if fit else f"; the weights have {describe_sizes(state)}"
    check_fit(model, state, source=str(path), hint=hint)
    return model, state
