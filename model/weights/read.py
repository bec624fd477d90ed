"""Read weights from any known file or folder, under the names of the original Wan model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from model.weights.gguf import MAGIC as GGUF_MAGIC
from model.weights.gguf import read_gguf
from model.weights.mapping import StateDict, map_tensors
from model.weights.names import FOREIGN_NAMES, rename_keys, strip_wrappers
from model.weights.paths import OTHER_WEIGHT_FILES, WEIGHT_FILES, find_part, weight_files
from model.weights.published import not_found
from model.weights.safetensors_file import SAFETENSORS_ENDINGS, safetensors_entries
from model.weights.scaled import apply_scales
from model.weights.torch_file import read_torch
from utils.errors import UserError
from utils.side_files import read_json
from utils.unpickle import ZIP_MAGIC

TOKENIZER_TENSOR = "spiece_model"  # in repackaged text encoders a tensor of bytes holds the tokenizer's file
MAX_INDEX_BYTES = 64 * 2**20
MAX_NAME = 512


@dataclass
class ShardIndex:
    """The index file beside the shards of a model."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]
    """Tensor name -> file."""


def load_state_dict(path: str | Path, *, use_ema: bool | None = None) -> StateDict:
    """Read weights in any known format, under our names.

    The tensors are memory-mapped, on the CPU, in the dtype they are stored in. Weights with scales or in GGUF are
    `PackedTensor`s, which are unpacked when they are used.

    Args:
        path: a file or a folder. docs/weights.md lists the formats. From a diffusers pipeline, the transformer is read.
        use_ema: which generator of a training checkpoint to take: the averaged one, the raw one, or (None) the averaged
            one if there is one. Formats with a single set of weights ignore it.

    Raises:
        UserError: the file is missing, damaged, unsafe or holds no weights. The message names it.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path)
    path = find_part(path, "transformer")
    state = read_folder(path) if path.is_dir() else read_file(path, use_ema=use_ema)
    state = strip_wrappers(state, source=str(path))
    state.pop(TOKENIZER_TENSOR, None)
    state = apply_scales(state, source=str(path))
    for marker, key_map in FOREIGN_NAMES.items():
        if marker in state:
            return rename_keys(state, key_map, source=str(path))
    return state


def read_folder(folder: Path) -> StateDict:
    """Return the weights of a model folder, one file or shards with an index, under the names in the files."""
    for name in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES):
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    files = weight_files(folder)
    if len(files) == 1:
        return read_file(files[0])
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) == 1:
        return _read_shards(indexes[0])
    if files:
        named = ", ".join(file.name for file in files[:5])
        raise UserError(f"{folder}: holds {len(files)} files of weights ({named}); name the one to read")
    raise UserError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)} (nor their .index.json)")


def _read_shards(index: Path) -> StateDict:
    weight_map = read_json(index, ShardIndex, max_bytes=MAX_INDEX_BYTES).weight_map
    state: StateDict = {}
    for name in sorted(set(weight_map.values())):
        # Check the name, not the target: the shards of a hub snapshot are links that lead out of the folder.
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{index}: names the shard {name!r} outside its own folder; refused")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names the shard {name!r}, which is missing; download it into {index.parent}")
        state |= read_file(index.parent / name)
    if absent := weight_map.keys() - state.keys():
        raise UserError(
            f"{index}: lists {min(absent)!r}, but no shard holds it ({len(absent)} such tensors); download it again"
        )
    return state


def read_file(path: Path, *, use_ema: bool | None = None, key: str | None = None) -> StateDict:
    """Return the tensors of one file, under the names in the file.

    Args:
        use_ema: see :func:`load_state_dict`.
        key: the entry of a PyTorch file to read, if the file has it. None finds the right one.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; download it again")
        state = _read_kind(path, use_ema=use_ema, key=key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); download it again") from None
    if not state:
        raise UserError(f"{path}: holds no tensors")
    longest = max(state, key=len)
    if len(longest) > MAX_NAME or not all(name.isprintable() for name in state):
        raise UserError(f"{path}: the name of a tensor has {len(longest)} characters or unprintable ones; refused")
    return state


def _read_kind(path: Path, *, use_ema: bool | None, key: str | None) -> StateDict:
    """Return the tensors of a file. Its first bytes decide the format. If they are unknown, the name's ending does."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(GGUF_MAGIC):
        return read_gguf(path)
    is_torch = start.startswith((ZIP_MAGIC, b"\x80"))
    if start[8:] == b"{" or (path.suffix.lower() in SAFETENSORS_ENDINGS and not is_torch):
        return map_tensors(path, safetensors_entries(path))
    return read_torch(path, use_ema=use_ema, key=key)
