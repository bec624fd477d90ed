"""Write tensors to files, one tensor at a time, so that memory for one tensor is enough.

Every file is written under another name and then renamed, so that a reader never sees half a file.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.weights.mapping import SAFETENSORS_DTYPES
from model.weights.paths import CONFIG_FILE, WEIGHT_FILES
from utils.files import atomic_path, atomic_write_text

SHARD_BYTES = 10 * 10**9


def save_folder(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, object],
    *,
    dtype: torch.dtype | None = None,
    name: str = WEIGHT_FILES[0],
    shard_bytes: int = SHARD_BYTES,
    config_file: str = CONFIG_FILE,
) -> None:
    """Write a model folder: its weights and its config.json.

    Args:
        folder: the folder. It is created if it does not exist. Files of an earlier save are replaced.
        weights: a module or its state dict. Tied tensors are written once for each name.
        config: the content of config.json.
        dtype: converts floating-point tensors. None keeps their type.
        name: the name of the weights file.
        shard_bytes: larger weights are written as several shards with an index.
        config_file: the name of the file for `config`.
    """
    folder = Path(folder)
    config_text = json.dumps(config, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    shards = _split(state, dtype, shard_bytes)
    before = {folder / name, *folder.glob(f"{Path(name).stem}-*-of-*.safetensors"), folder / f"{name}.index.json"}
    if len(shards) == 1:
        save_safetensors(folder / name, state, dtype=dtype)
        written = {folder / name}
    else:
        written = _save_shards(folder, name, state, shards, dtype)
    atomic_write_text(folder / config_file, config_text)
    for file in before - written:  # an earlier save had another number of shards
        file.unlink(missing_ok=True)


def _save_shards(
    folder: Path, name: str, state: Mapping[str, Tensor], shards: list[list[str]], dtype: torch.dtype | None
) -> set[Path]:
    """Write one file for each shard, then the index that lists them. Return their paths."""
    stem, index = Path(name).stem, folder / f"{name}.index.json"
    files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, keys in zip(files, shards, strict=True):
        save_safetensors(folder / file, {key: state[key] for key in keys}, dtype=dtype)
    weight_map = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
    total = sum(_num_bytes(tensor, dtype) for tensor in state.values())
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write_text(index, json.dumps(listing, indent=2) + "\n")
    return {index, *(folder / file for file in files)}


def save_safetensors(path: str | Path, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file of any size."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest elements first keep every tensor aligned.
    ordered = sorted(state, key=lambda key: -_stored_dtype(state[key], dtype).itemsize)
    offset = 0
    for key in ordered:
        end = offset + _num_bytes(state[key], dtype)
        header[key] = {
            "dtype": names[_stored_dtype(state[key], dtype)],
            "shape": list(state[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            tensor = convert(state[key], dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def save_torch(path: str | Path, content: Mapping[str, object]) -> None:
    """Write a PyTorch file."""
    with atomic_path(path) as temporary:
        torch.save(dict(content), temporary)


def convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return `tensor` on the CPU. A floating-point tensor is converted to `dtype`, unless that is None."""
    return tensor.detach().to("cpu", _stored_dtype(tensor, dtype))


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize


def _split(state: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int) -> list[list[str]]:
    """Split the names, in order, into shards of at most `shard_bytes`. A larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in state.items():
        size = _num_bytes(tensor, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
