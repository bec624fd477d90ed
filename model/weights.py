"""Every on-disk weight format ↔ our parameter names (the original Wan ones): strict, safe, memory-mapped.

Three tables say what is understood; a further format is a further row:
`WEIGHT_FILES` (what a folder may hold), `WRAPPER_SEGMENTS` (name parts wrappers add), `FOREIGN_NAMES` (other libraries'
parameter names). Pickled code is never run.
"""

import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError

StateDict = dict[str, Tensor]
# Rows of (name here, name there); each `*` stands for one dotted segment and must occur equally often on both sides.
KeyMap = tuple[tuple[str, str], ...]

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
WRAPPER_SEGMENTS = {"model", "module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}

# Wan2.1's models_t5_umt5-xxl-enc-bf16.pth → transformers' UMT5EncoderModel.
WAN_T5_TO_TRANSFORMERS: KeyMap = (
    ("token_embedding.weight", "shared.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
    ("blocks.*.norm1.weight", "encoder.block.*.layer.0.layer_norm.weight"),
    *((f"blocks.*.attn.{x}.weight", f"encoder.block.*.layer.0.SelfAttention.{x}.weight") for x in "qkvo"),
    ("blocks.*.pos_embedding.embedding.weight", "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("blocks.*.norm2.weight", "encoder.block.*.layer.1.layer_norm.weight"),
    ("blocks.*.ffn.gate.0.weight", "encoder.block.*.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.*.ffn.fc1.weight", "encoder.block.*.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.*.ffn.fc2.weight", "encoder.block.*.layer.1.DenseReluDense.wo.weight"),
)

# Original Wan transformer → diffusers' WanTransformer3DModel (text-to-video).
WAN_TO_DIFFUSERS: KeyMap = (
    ("patch_embedding.*", "patch_embedding.*"),
    ("text_embedding.0.*", "condition_embedder.text_embedder.linear_1.*"),
    ("text_embedding.2.*", "condition_embedder.text_embedder.linear_2.*"),
    ("time_embedding.0.*", "condition_embedder.time_embedder.linear_1.*"),
    ("time_embedding.2.*", "condition_embedder.time_embedder.linear_2.*"),
    ("time_projection.1.*", "condition_embedder.time_proj.*"),
    *(
        (f"blocks.*.{ours}.{part}.*", f"blocks.*.{theirs}.{renamed}.*")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, renamed in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    ("blocks.*.norm3.*", "blocks.*.norm2.*"),
    ("blocks.*.ffn.0.*", "blocks.*.ffn.net.0.proj.*"),
    ("blocks.*.ffn.2.*", "blocks.*.ffn.net.2.*"),
    ("blocks.*.modulation", "blocks.*.scale_shift_table"),
    ("head.head.*", "proj_out.*"),
    ("head.modulation", "scale_shift_table"),
)

# A tensor only that library's files have → how its names become ours.
FOREIGN_NAMES: dict[str, KeyMap] = {
    "condition_embedder.time_proj.weight": tuple((ours, theirs) for theirs, ours in WAN_TO_DIFFUSERS),
    "token_embedding.weight": WAN_T5_TO_TRANSFORMERS,
}


def load_state_dict(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """Read weights in any known format, under our names, memory-mapped on the CPU and in the dtype they are stored in.

    Args:
        path: a folder (config.json beside model.safetensors or diffusion_pytorch_model.safetensors, single or sharded
            with an index), a .safetensors file, or a PyTorch file holding a bare state dict, {"state_dict": ...},
            {"model": ...} or the official training checkpoint {"generator", "critic", "generator_ema"}.
        use_ema: which generator a training checkpoint gives; formats with a single set of weights ignore it.

    Raises:
        UserError: one line naming the file, for anything missing, damaged, unsafe or without weights.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path or download the weights")
    state = _read_folder(path) if path.is_dir() else _read_file(path, use_ema=use_ema)
    state = _strip_wrappers(state, path)
    for marker, key_map in FOREIGN_NAMES.items():
        if marker in state:
            return rename_keys(state, key_map, source=str(path))
    return state


def read_config(folder: str | Path) -> dict:
    """The config.json of a model folder; UserError when it is missing or not a JSON object."""
    return _read_json(Path(folder) / CONFIG_FILE)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def _read_folder(folder: Path) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise UserError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)} (nor their .index.json)")


def _read_shards(index: Path) -> StateDict:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index}: has no usable weight_map")
    state: StateDict = {}
    for name in sorted(set(weight_map.values())):
        # Lexical on purpose: the shards of a hub snapshot are links that lead out of the folder.
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{index}: names the shard {name!r} outside its own folder; refused")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names the shard {name!r}, which is missing; download it into {index.parent}")
        state |= _read_file(index.parent / name)
    if absent := weight_map.keys() - state.keys():
        raise UserError(f"{index}: promises {min(absent)!r}, which no shard holds ({len(absent)} such tensors)")
    return state


def _read_file(path: Path, *, use_ema: bool = True) -> StateDict:
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; download it again")
        if path.suffix == ".safetensors":
            state = _read_safetensors(path)
        else:
            state = _select_weights(_read_torch(path), path, use_ema=use_ema)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); download it again") from None
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return state


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None


def _read_torch(path: Path) -> object:
    with path.open("rb") as file:
        magic = file.read(4)
    is_zip = magic == b"PK\x03\x04"  # files from before torch 1.6 are plain pickles and cannot be memory-mapped
    if not is_zip and magic[:1] != b"\x80":
        raise UserError(f"{path}: is not a PyTorch file (it starts with {magic!r}); download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise UserError(f"{path}: contains pickled code besides tensors; refused, nothing was run") from None
        raise UserError(f"{path}: is not a PyTorch checkpoint or is damaged; download it again") from None
    except Exception as error:  # damaged bytes can raise anything while they are unpickled
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); download it again") from None


def _select_weights(content: object, path: Path, *, use_ema: bool) -> StateDict:
    """The one state dict meant, out of what a PyTorch file holds."""
    if isinstance(content, Mapping):
        if "generator" in content or "generator_ema" in content:
            wanted = "generator_ema" if use_ema else "generator"
            if wanted not in content:
                remedy = "drop --use_ema" if use_ema else "pass --use_ema"
                raise UserError(f"{path}: has no {wanted} (it holds {', '.join(map(str, content))}); {remedy}")
            content = content[wanted]
        else:
            content = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__} where a state dict was expected")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: its entry {key!r} is a {type(value).__name__}, not a tensor; not a state dict")
    return dict(content)


def _strip_wrappers(state: StateDict, path: Path) -> StateDict:
    """Drop the name segments that FSDP, DDP, torch.compile, checkpointing and wrappers add, wherever they stand."""
    stripped: StateDict = {}
    for key, tensor in state.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPER_SEGMENTS)
        if name in stripped:
            raise UserError(f"{path}: two tensors are called {name!r} once wrapper prefixes are dropped")
        stripped[name] = tensor
    return stripped


def rename_keys(state: Mapping[str, Tensor], key_map: KeyMap, *, source: str = "state dict") -> StateDict:
    """Rename every tensor by the one row that fits; UserError naming the first tensor that no row knows."""
    rows = [(re.compile(re.escape(old).replace(r"\*", r"([^.]+)")), new.replace("*", "{}")) for old, new in key_map]
    renamed: StateDict = {}
    for key, tensor in state.items():
        match, new = next(((m, new) for old, new in rows if (m := old.fullmatch(key))), (None, ""))
        if match is None:
            raise UserError(f"{source}: the tensor {key!r} {tuple(tensor.shape)} has no place in this kind of model")
        renamed[new.format(*match.groups())] = tensor
    return renamed


def wan_to_diffusers(state: Mapping[str, Tensor]) -> StateDict:
    """Original Wan transformer names → diffusers' WanTransformer3DModel names."""
    return rename_keys(state, WAN_TO_DIFFUSERS)


def diffusers_to_wan(state: Mapping[str, Tensor]) -> StateDict:
    """diffusers' WanTransformer3DModel names → original Wan transformer names."""
    return rename_keys(state, FOREIGN_NAMES["condition_embedder.time_proj.weight"])


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, source: str, dtype: torch.dtype | None = None) -> None:
    """Give `module` (on the meta device or not) the tensors of `state`: strictly, and without a second copy.

    Args:
        source: what the tensors came from, for the error message.
        dtype: converts floating-point tensors one by one; None keeps the dtype they are stored in.

    Raises:
        UserError: names the first three tensors that are missing, unexpected or of another shape, with both shapes.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = [
        f"{key} (file: {given.get(key, 'missing')}, model: {expected.get(key, 'not in it')})"
        for key in {**expected, **given}
        if given.get(key) != expected.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit {type(module).__name__}: {'; '.join(wrong[:3])}{more}")
    converted = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    module.load_state_dict(converted, strict=True, assign=True)


def infer_transformer_sizes(state: Mapping[str, Tensor]) -> dict[str, int | list[int]]:
    """Sizes of a Wan transformer, read off its tensors' shapes and named as in `WanConfig`.

    num_heads, text_len, eps and prediction_type leave no trace in the shapes: they come from config.json or a preset
    (Wan's own models have heads of 128).
    """
    names = (
        "patch_embedding.weight",
        "head.head.weight",
        "time_embedding.0.weight",
        "text_embedding.0.weight",
        "blocks.0.ffn.0.weight",
    )
    if absent := [name for name in names if name not in state]:
        raise UserError(f"not a Wan transformer: it has no tensor {absent[0]!r}")
    patch, head, time, text, ffn = (tuple(state[name].shape) for name in names)
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


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules `prefix`.0, `prefix`.1, ... the names mention."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def save_folder(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, object],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors, each beside its place and then renamed: never half a file.

    `dtype` converts floating-point tensors; None keeps them. No two tensors may share memory (drop tied ones first).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {
        key: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for key, tensor in state.items()
    }
    with _replacing(folder / WEIGHT_FILES[0]) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with _replacing(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` on success only."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes its files readable by their owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def weights_hash(weights: Mapping[str, Tensor] | str | Path) -> str:
    """12 hex digits that identify weights: the same names, dtypes, shapes and values give the same, in any format.

    Of tensors above 256 KiB only 16 evenly spaced blocks are read, so that 14B parameters take a second, not a minute:
    it tells checkpoints apart, it does not prove them unaltered.
    """
    block, blocks = 16 * 1024, 16
    state = weights if isinstance(weights, Mapping) else load_state_dict(weights)
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.contiguous().reshape(-1).view(torch.uint8)
        step = max(block, (content.numel() - block) // (blocks - 1))
        for start in range(0, content.numel(), step):
            digest.update(content[start : start + block].cpu().numpy())
    return digest.hexdigest()[:12]
