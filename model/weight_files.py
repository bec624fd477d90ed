"""Files of weights → tensors: safetensors, PyTorch files, shards and folders; safe and memory-mapped.

Pickled code is never run, a damaged file gives one line that names it, and a missing one the command that downloads it.
"""

import json
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

StateDict = dict[str, Tensor]

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")

WRAPPER_SEGMENTS = {
    "model",
    "module",
    "diffusion_model",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
}

# What a release calls its parts: a diffusers pipeline's subfolder, then Wan's own file or folder.
PARTS = {
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("tokenizer", "google/umt5-xxl"),
    "vae": ("vae", "Wan2.1_VAE.pth"),
}

# Published weights: what a path to them looks like → the command that fetches them to where that path points.
DOWNLOADS = (
    (r"(?P<into>.*Wan2\.1-T2V-1\.3B)(/.*)?", "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {into}"),
    (r"(?P<into>.*Wan2\.1-T2V-14B)(/.*)?", "hf download Wan-AI/Wan2.1-T2V-14B --local-dir {into}"),
    (
        r"(?P<into>.*?)/?(?P<file>checkpoints/(self_forcing_\w+|ode_init)\.pt)",
        "hf download gdhe17/Self-Forcing {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>(chunkwise|framewise|causal-forcing\+\+)/[\w-]+\.pt)",
        "hf download zhuhz22/Causal-Forcing {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>(autoregressive_checkpoint|wan_causal_ode_checkpoint_model_003000)/model\.pt)",
        "hf download tianweiy/CausVid {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?models/(longlive_base|lora)\.pt",
        "hf download Efficient-Large-Model/LongLive-1.3B --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>krea-realtime-video-14b\.safetensors)",
        "hf download krea/krea-realtime-video {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>taew2_1\.pth)",
        "curl -L --create-dirs -o {into}/{file} https://github.com/madebyollin/taehv/raw/main/{file}",
    ),
)

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WINDOW_BYTES = 128 * 2**20  # smallest piece of a file that is mapped; large files are mapped in MAX_WINDOWS pieces
MAX_WINDOWS = 32


@dataclass(frozen=True)
class Entry:
    """Where a contiguous tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + torch.Size(self.shape).numel() * self.dtype.itemsize


def not_found(path: str | Path) -> UserError:
    """The error for weights that are not there: which file, where it was looked for, and how to get it."""
    path = Path(path)
    remedy = "check the path, or download the weights"
    for pattern, command in DOWNLOADS:
        if match := re.fullmatch(pattern, path.as_posix()):
            parts = {name: value or "." for name, value in match.groupdict().items()}
            remedy = f"download it: {command.format(**parts)}"
            break
    return UserError(f"{path}: no such file or folder (looked for {path.absolute()}); {remedy}")


def plain_name(key: str) -> str:
    """A tensor's name without the parts that FSDP, DDP, torch.compile, checkpointing and wrappers add, anywhere."""
    return ".".join(part for part in key.split(".") if part not in WRAPPER_SEGMENTS)


def find_part(path: str | Path, part: str) -> Path:
    """Where a release folder keeps `part` (a key of PARTS); `path` itself where it is no such folder."""
    path = Path(path)
    return next((path / name for name in PARTS[part] if (path / name).exists()), path)


def read_config(folder: str | Path) -> dict:
    """The config.json of a model folder; UserError when it is missing or not a JSON object."""
    return read_json(Path(folder) / CONFIG_FILE)


def read_json(path: Path) -> dict:
    """A file with a JSON object; UserError when it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def read_folder(folder: Path) -> StateDict:
    """The weights of a model folder, single or sharded with an index, under the names they are stored by."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise UserError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)} (nor their .index.json)")


def _read_shards(index: Path) -> StateDict:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index}: has no usable weight_map")
    state: StateDict = {}
    for name in sorted(set(weight_map.values())):
        # Lexical on purpose: the shards of a hub snapshot are links that lead out of the folder.
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{index}: names the shard {name!r} outside its own folder; refused")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names the shard {name!r}, which is missing; download it into {index.parent}")
        state |= read_file(index.parent / name)
    if absent := weight_map.keys() - state.keys():
        raise UserError(f"{index}: promises {min(absent)!r}, which no shard holds ({len(absent)} such tensors)")
    return state


def read_file(path: Path, *, use_ema: bool | None = None, key: str | None = None) -> StateDict:
    """The tensors of one file, under the names they are stored by.

    Args:
        use_ema: which generator of a training checkpoint: averaged, raw, or (None) averaged where there is one.
        key: the entry of a PyTorch file that is meant, where it has one; None finds it.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; download it again")
        if path.suffix == ".safetensors":
            state = _map_tensors(path, _safetensors_entries(path))
        else:
            state = _read_torch(path, use_ema=use_ema, key=key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); download it again") from None
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """The free text entries of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks the header against the file
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if unknown := {tensor["dtype"] for tensor in header.values()} - SAFETENSORS_DTYPES.keys():
        raise UserError(f"{path}: holds tensors of the type {min(unknown)}, which cannot be read")
    return {
        name: Entry(SAFETENSORS_DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def _map_tensors(path: Path, entries: Mapping[str, Entry]) -> StateDict:
    """Copy-on-write maps of a file, in its order and in windows: the memory of a window is freed with its tensors.

    One map for the whole file would keep every page that was read; one for each tensor needs as many file descriptors.
    """
    state: StateDict = {}
    window, start, end = None, 0, 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        window_bytes = max(WINDOW_BYTES, size // MAX_WINDOWS)
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            if entry.end == entry.offset:
                state[name] = torch.empty(entry.shape, dtype=entry.dtype)
                continue
            if window is None or entry.end > end:
                start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
                end = max(entry.end, min(size, start + window_bytes))
                window = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
            flat = torch.frombuffer(
                window, dtype=entry.dtype, count=torch.Size(entry.shape).numel(), offset=entry.offset - start
            )
            state[name] = flat.view(entry.shape)
    return state


def _read_torch(path: Path, *, use_ema: bool | None, key: str | None) -> StateDict:
    with path.open("rb") as file:
        magic = file.read(4)
    is_zip = magic == b"PK\x03\x04"  # files from before torch 1.6 are plain pickles and cannot be memory-mapped
    if not is_zip and magic[:2] != b"\x80\x02":
        if magic[:1] == b"\x80":  # torch.save writes protocol 2
            raise UserError(f"{path}: is some Python pickle, which may hold code; refused, nothing was run")
        raise UserError(f"{path}: is not a PyTorch file (it starts with {magic!r}); download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise UserError(f"{path}: contains pickled code besides tensors; refused, nothing was run") from None
        raise UserError(f"{path}: is not a PyTorch checkpoint or is damaged; download it again") from None
    except Exception as error:  # damaged bytes can raise anything while they are unpickled
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); download it again") from None
    state = _select_weights(content, path, use_ema=use_ema, key=key)
    return _remap(content, state, path) if is_zip else state


def _remap(content: object, state: StateDict, path: Path) -> StateDict:
    """`state`, which torch has mapped as one piece with all of `content`, in windows of its own (see `_map_tensors`).

    Storages lie in memory as their records lie in the file; where the two do not match one to one, torch's map is kept.
    """
    addresses = {t.untyped_storage().data_ptr() for t in _tensors(content) if t.untyped_storage().nbytes()}
    try:
        records = set(_record_offsets(path))
    except (zipfile.BadZipFile, struct.error):  # torch is less strict
        return state
    base = min(addresses, default=0) - min(records, default=0)
    if {address - base for address in addresses} != records or not all(t.is_contiguous() for t in state.values()):
        return state
    return _map_tensors(path, {n: Entry(t.dtype, tuple(t.shape), t.data_ptr() - base) for n, t in state.items()})


def _tensors(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value)


def _record_offsets(path: Path) -> Iterator[int]:
    """Where the bytes of each stored tensor begin in a PyTorch zip file."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.file_size and re.search(r"/data/\d+$", record.filename):
                file.seek(record.header_offset + 26)  # lengths of the name and the padding, which the data follow
                yield record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _select_weights(content: object, path: Path, *, use_ema: bool | None, key: str | None) -> StateDict:
    """The one state dict meant, out of what a PyTorch file holds."""
    if isinstance(content, Mapping):
        if key is not None and key in content:
            content = content[key]
        elif content.keys() & {"generator", "generator_ema", "critic"}:
            _check_not_swapped(content, path)
            content = _select_generator(content, path, use_ema=use_ema)
        else:
            content = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__} where a state dict was expected")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: its entry {name!r} is called by no text; not a state dict")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: its entry {name!r} is a {type(value).__name__}, not a tensor; not a state dict")
        if value.is_meta or value.layout is not torch.strided or value.dtype not in SAFETENSORS_DTYPES.values():
            kind = "tensor without values" if value.is_meta else f"{value.dtype} tensor ({value.layout})"
            raise UserError(f"{path}: its entry {name!r} is a {kind}; use plain weights of real numbers")
    return dict(content)


def _select_generator(content: Mapping, path: Path, *, use_ema: bool | None) -> object:
    if not content.keys() & {"generator", "generator_ema"}:
        raise UserError(f"{path}: holds a critic but no generator; give a checkpoint with a generator")
    if use_ema is None:
        use_ema = "generator_ema" in content
    wanted = "generator_ema" if use_ema else "generator"
    if wanted not in content:
        remedy = "drop --use_ema" if use_ema else "pass --use_ema"
        raise UserError(f"{path}: has no {wanted} (it holds {', '.join(map(str, content))}); {remedy}")
    return content[wanted]


def _check_not_swapped(content: Mapping, path: Path) -> None:
    """Refuse a checkpoint whose "generator" is the critic: only small tensors are looked at.

    A critic may have a discriminator's heads, a generator never; and an average lies near what it averages: 4 times
    nearer to the critic than to the generator it cannot be unless the two are swapped.
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
