"""Read PyTorch files (.pt, .pth, .bin) safely and memory-mapped, and find the wanted state dict in them."""

import logging
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from model.weights.mapping import SAFETENSORS_DTYPES, Entry, StateDict, map_tensors
from model.weights.names import plain_name
from utils.errors import UserError
from utils.unpickle import load_torch

log = logging.getLogger(__name__)


def read_torch(path: Path, *, use_ema: bool | None, key: str | None) -> StateDict:
    """Return the wanted state dict of a PyTorch file.

    Args:
        use_ema: which generator of a training checkpoint: averaged, raw, or (None) averaged if there is one.
        key: the wanted entry, if the file has it. None finds it.
    """
    content = load_torch(path)
    state = _select_weights(content, path, use_ema=use_ema, key=key)
    return _remap(content, state, path)


def _remap(content: object, state: StateDict, path: Path) -> StateDict:
    """Map the tensors of `state` again, in windows (see `map_tensors`).

    torch has mapped the whole file as one piece. Tensors have the same order in that piece as their records in the
    file, so their places in the file are known. If tensors and records do not match, torch's own map is kept.
    """
    if not zipfile.is_zipfile(path):  # files from before torch 1.6
        return state
    addresses = {t.untyped_storage().data_ptr() for t in _tensors(content) if t.untyped_storage().nbytes()}
    try:
        records = set(_record_offsets(path))
    except (zipfile.BadZipFile, struct.error):  # torch is less strict
        return state
    base = min(addresses, default=0) - min(records, default=0)
    if {address - base for address in addresses} != records or not all(t.is_contiguous() for t in state.values()):
        return state
    return map_tensors(path, {n: Entry(t.dtype, tuple(t.shape), t.data_ptr() - base) for n, t in state.items()})


def _tensors(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value)


def _record_offsets(path: Path) -> Iterator[int]:
    """Yield the positions in a PyTorch zip file at which the bytes of stored tensors begin."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.file_size and re.search(r"/data/\d+$", record.filename):
                file.seek(record.header_offset + 26)  # lengths of the name and the padding, which the data follow
                yield record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _select_weights(content: object, path: Path, *, use_ema: bool | None, key: str | None) -> StateDict:
    """Return the wanted state dict in the content of a PyTorch file."""
    if isinstance(content, Mapping):
        if key is not None and key in content:
            content = content[key]
        elif content.keys() & {"generator", "generator_ema", "critic"}:
            _check_not_swapped(content, path)
            content = _select_generator(content, path, use_ema=use_ema)
        else:
            content = next((content[key] for key in ("state_dict", "model") if key in content), _only_entry(content))
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; give a file of weights")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: its entry {name!r} has a name that is not text; give a state dict")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: its entry {name!r} is a {type(value).__name__}, not a tensor; give a state dict")
        if value.is_meta or value.layout is not torch.strided or value.dtype not in SAFETENSORS_DTYPES.values():
            kind = "tensor without values" if value.is_meta else f"{value.dtype} tensor ({value.layout})"
            raise UserError(f"{path}: its entry {name!r} is a {kind}; use plain weights of real numbers")
    return dict(content)


def _only_entry(content: Mapping) -> object:
    """Return the inner mapping of a mapping like {"lora": {...}}, which has one entry; else the mapping itself."""
    value = next(iter(content.values()), None)
    return value if len(content) == 1 and isinstance(value, Mapping) else content


def _select_generator(content: Mapping, path: Path, *, use_ema: bool | None) -> object:
    if not content.keys() & {"generator", "generator_ema"}:
        raise UserError(f"{path}: holds a critic but no generator; give a checkpoint with a generator")
    if use_ema is None:
        use_ema = "generator_ema" in content
    wanted = "generator_ema" if use_ema else "generator"
    if wanted not in content:
        remedy = "drop --use_ema" if use_ema else "pass --use_ema"
        raise UserError(f"{path}: has no {wanted} (it holds {', '.join(map(str, content))}); {remedy}")
    if {"generator", "generator_ema"} <= content.keys():
        _say_which(path, wanted)
    return content[wanted]


@cache
def _say_which(path: Path, wanted: str) -> None:
    """Log which of two generators is read. Files are read several times, so log each file and choice only once."""
    other = "generator" if wanted == "generator_ema" else "generator_ema"
    kind = "averaged" if wanted == "generator_ema" else "trained"
    log.info("%s: reads the %s weights (%s), not %s; generator.use_ema chooses", path, kind, wanted, other)


def _check_not_swapped(content: Mapping, path: Path) -> None:
    """Refuse a checkpoint whose "generator" is the critic.

    There are two signs. Only a critic has the heads of a discriminator. And an average is close to the weights that it
    averages: if the distance from generator_ema to the critic is less than a quarter of that to the generator, the two
    are swapped. Only small tensors are compared.
    """
    generator, critic, ema = (content.get(name) for name in ("generator", "critic", "generator_ema"))
    if not isinstance(generator, Mapping) or not isinstance(critic, Mapping):
        return
    heads = [key for key in generator if re.search(r"cls_pred_branch|gan_ca_blocks|register_tokens", str(key))]
    if heads:
        raise UserError(f"{path}: its generator holds {heads[0]!r}, a part of a critic; the two are swapped")
    if not isinstance(ema, Mapping):
        return
    by_name = [{plain_name(str(key)): value for key, value in state.items()} for state in (generator, critic, ema)]
    shared = (key for key in by_name[2] if all(_is_small(state.get(key)) for state in by_name))
    to_generator = to_critic = 0.0
    for key in islice(shared, 64):
        generator_tensor, critic_tensor, average = (state[key].double() for state in by_name)
        to_generator += (average - generator_tensor).square().sum().item()
        to_critic += (average - critic_tensor).square().sum().item()
    if to_critic < to_generator / 16:  # squared distances
        raise UserError(f"{path}: its generator_ema is an average of its critic; generator and critic are swapped")


def _is_small(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() <= 2**16
