"""Read a LoRA file or folder of any trainer: find the file, split its keys, and build exact differences."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from model.weights.adapters import Decomposed, Hadamard, Kronecker, LowRank, Replacement, Whole
from model.weights.fit import check_finite
from model.weights.lora import PEFT_CONFIG, LoRA
from model.weights.lora_config import AdapterSettings, read_settings
from model.weights.lora_dialects import UNSUPPORTED, Key, foreign_layer, our_layer, split_key
from model.weights.names import without_wrappers
from model.weights.paths import WEIGHT_ENDINGS, weight_files
from model.weights.published import not_found
from model.weights.read import read_file
from utils.errors import UserError

# Names of the file in a folder of peft or diffusers, in the order in which they are tried.
LORA_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)

Parts = dict[str, Tensor]


@dataclass
class LoraFile:
    """The tensors of one adapter, sorted by layer."""

    source: str
    settings: AdapterSettings
    layers: dict[str, Parts] = field(default_factory=dict)
    """Layer name as in the file -> part -> tensor."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Whole parameters: name as in the file -> new value."""


def load_lora(path: str | Path, *, adapter: str | None = None) -> LoRA:
    """Read a LoRA of any trainer.

    Args:
        path: a peft or diffusers folder, a folder with one file of weights, a .safetensors file, or a PyTorch file such
            as LongLive's lora.pt.
        adapter: which adapter to read if the file or the folder holds several.

    Raises:
        UserError: the file is missing, damaged or incomplete, is of an unknown kind, or holds layers that no Wan
            transformer has. The message names the file.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path)
    if path.is_dir():
        path = _find_file(path, adapter)
    file = _sort_keys(path, adapter)
    lora = LoRA(source=str(path))
    for name, parts in file.layers.items():
        layer = our_layer(name)
        if layer is not None:
            _add_layer(lora, layer, name, parts, file)
        elif purpose := foreign_layer(name):
            lora.left_out[name] = purpose
        else:
            raise UserError(f"{path}: the layer {name!r} has no place in a text-to-video Wan transformer")
    for name, tensor in file.values.items():
        layer, _, end = name.rpartition(".")
        if (ours := our_layer(layer)) is not None:
            lora.full[f"{ours}.{end}"] = Replacement(tensor)
        elif purpose := foreign_layer(layer):
            lora.left_out[layer] = purpose
        else:
            raise UserError(f"{path}: the tensor {name!r} has no place in a text-to-video Wan transformer")
    if not (lora.layers or lora.full or lora.left_out):
        raise UserError(f"{path}: changes no layer; use another LoRA")
    return lora


def _find_file(folder: Path, adapter: str | None) -> Path:
    """Return the file of weights in an adapter's folder. peft keeps named adapters in subfolders."""
    for name in LORA_FILES:
        if (folder / name).is_file():
            return folder / name
    files = weight_files(folder)
    if len(files) == 1:
        return files[0]
    if files:
        named = ", ".join(file.name for file in files[:5])
        raise UserError(f"{folder}: holds {len(files)} files of weights ({named}); name the one to read")
    named = sorted(child.name for child in folder.iterdir() if (child / PEFT_CONFIG).is_file())
    if adapter in named or (adapter is None and len(named) == 1):
        return _find_file(folder / (adapter or named[0]), None)
    if named:
        raise UserError(f"{folder}: holds the adapters {', '.join(named)}; name one: {folder}#{named[0]}")
    raise UserError(
        f"{folder}: holds neither {' nor '.join(LORA_FILES)}, nor another file *{', *'.join(WEIGHT_ENDINGS)}"
    )


def _sort_keys(path: Path, adapter: str | None) -> LoraFile:
    """Sort the tensors of a file by layer, and choose one adapter."""
    state = read_file(path, key="generator_lora")
    keys = {name: split_key(without_wrappers(name.replace(".base_layer", ""))) for name in state}
    chosen = _choose_adapter(path, keys.values(), adapter)
    file = LoraFile(str(path), read_settings(path))
    for name, tensor in state.items():
        key = keys[name]
        if key is not None and key.part in UNSUPPORTED:
            kind = UNSUPPORTED[key.part]
            raise UserError(f"{path}: is an adapter of the kind {kind} ({name!r}), which cannot be merged; use a LoRA")
        _check_tensor(tensor, key, f"{path}: the tensor {name!r}")
        if key is None:
            if not file.settings.has_whole_values:
                raise UserError(f"{path}: the tensor {name!r} {tuple(tensor.shape)} belongs to no known kind of LoRA")
            file.values[without_wrappers(name.replace(".modules_to_save", "").replace(".base_layer", ""))] = tensor
        elif key.adapter in (chosen, None):
            part = f"{key.part} bias" if key.is_bias else key.part
            parts = file.layers.setdefault(key.layer, {})
            if part in parts:
                raise UserError(
                    f"{path}: holds two tensors for the part {part!r} of {key.layer!r}; use one LoRA a file"
                )
            parts[part] = tensor
    return file


def _choose_adapter(path: Path, keys: Collection[Key | None], wanted: str | None) -> str | None:
    names = sorted({key.adapter for key in keys if key is not None and key.adapter is not None})
    if wanted is not None and names and wanted not in names:
        raise UserError(f"{path}: has no adapter {wanted!r}; it holds {', '.join(names)}")
    if wanted is None and len(names) > 1:
        raise UserError(f"{path}: holds the adapters {', '.join(names)}; name one: {path}#{names[0]}")
    return wanted or next(iter(names), None)


def _check_tensor(tensor: Tensor, key: Key | None, name: str) -> None:
    if key is not None and key.part == "alpha":
        if tensor.numel() != 1:
            raise UserError(f"{name} has {tensor.numel()} values, but an alpha is one number")
        tensor = tensor.float()
    if not tensor.is_floating_point():
        raise UserError(f"{name} is stored as {tensor.dtype}; use a LoRA in float or bfloat16")
    check_finite(tensor, name)


def _add_layer(lora: LoRA, layer: str, name: str, parts: Parts, file: LoraFile) -> None:
    """Build the differences of one layer."""
    parts = dict(parts)
    if layer in lora.layers:
        raise UserError(f"{file.source}: {layer!r} is there twice, the second time as {name!r}; use one LoRA a file")
    modulation = f"{layer}.modulation"
    for part, parameter, adapter in (
        ("diff", layer if layer.endswith("modulation") else f"{layer}.weight", Whole),
        ("diff_b", f"{layer}.bias", Whole),
        ("diff_m", modulation, Whole),
        ("set_weight", f"{layer}.weight", Replacement),
    ):
        if part in parts:
            lora.full[parameter] = adapter(parts.pop(part))
    kind = next((kind for kind in KINDS if any(part in parts for part in kind.parts)), None)
    if kind is not None:
        lora.layers[layer] = _checked(kind, name, parts, file)
        if "up bias" in parts:
            lora.full[f"{layer}.bias"] = Whole(parts.pop("up bias"), lora.layers[layer].scale)
    elif parts.keys() - {"alpha"}:
        raise UserError(f"{file.source}: {name} has only the part {min(parts)!r}; the file is incomplete")


def _checked(kind: "Kind", name: str, parts: Parts, file: LoraFile) -> LowRank | Hadamard | Kronecker | Decomposed:
    """Build an adapter of a kind, with its length vector if there is one. UserError if its parts do not fit."""
    missing = next((part for part in kind.needed if part not in parts), None)
    if missing is not None:
        raise UserError(f"{file.source}: {name} has no {missing} ({kind.name}); the file is incomplete")
    adapter = kind.build(name, parts, file)
    try:
        on_meta = kind.build(name, {part: _on_meta(part, tensor) for part, tensor in parts.items()}, file)
        multiplies = on_meta.difference().shape == adapter.shape
    except (RuntimeError, IndexError, ValueError):
        multiplies = False
    if not multiplies:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items() if part != "alpha")
        raise UserError(f"{file.source}: {name}: the matrices cannot be multiplied ({shapes})")
    if "row lengths" in parts:
        decomposed = Decomposed(adapter, parts["row lengths"].flatten())
    elif "lengths" in parts:
        decomposed = Decomposed(adapter, parts["lengths"])
    else:
        return adapter
    if not decomposed.fits():
        shape = tuple(decomposed.magnitude.shape)
        raise UserError(f"{file.source}: {name}: the lengths {shape} of DoRA do not fit a weight {adapter.shape}")
    return decomposed


def _on_meta(part: str, tensor: Tensor) -> Tensor:
    """Return a tensor without values, to check whether shapes can be multiplied. Alphas keep their value."""
    return tensor if part == "alpha" else tensor.to("meta")


def _low_rank(name: str, parts: Mapping[str, Tensor], file: LoraFile) -> LowRank:
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2 or len(down) == 0:
        raise UserError(f"{file.source}: {name}: {tuple(down.shape)} and {tuple(up.shape)} are not two matrices")
    return LowRank(down, up, file.settings.scale(name, len(down), parts.get("alpha")), parts.get("mid"))


def _hadamard(name: str, parts: Mapping[str, Tensor], file: LoraFile) -> Hadamard:
    w1, w2 = ((parts[f"hada_{w}_a"], parts[f"hada_{w}_b"]) for w in ("w1", "w2"))
    kernels = (parts["hada_t1"], parts["hada_t2"]) if {"hada_t1", "hada_t2"} <= parts.keys() else None
    return Hadamard(w1, w2, file.settings.scale(name, len(w1[1]), parts.get("alpha")), kernels)


def _kronecker(name: str, parts: Mapping[str, Tensor], file: LoraFile) -> Kronecker:
    factors, rank = [], None
    for w in ("lokr_w1", "lokr_w2"):
        if w in parts:
            factors.append(parts[w])
        elif f"{w}_a" in parts and f"{w}_b" in parts:
            factors.append((parts[f"{w}_a"], parts[f"{w}_b"]))
            rank = len(parts[f"{w}_b"])
        else:
            raise UserError(f"{file.source}: {name} has no {w} (LoKr); the file is incomplete")
    return Kronecker(*factors, file.settings.scale(name, rank, parts.get("alpha")), parts.get("lokr_t2"))


@dataclass(frozen=True)
class Kind:
    """A kind of adapter and the parts that it consists of."""

    name: str
    build: Callable[[str, Mapping[str, Tensor], LoraFile], LowRank | Hadamard | Kronecker]
    parts: tuple[str, ...]
    """A layer with any of these parts is of this kind."""
    needed: tuple[str, ...] = ()
    """All of these parts must be there."""


KINDS = (
    Kind("LoRA", _low_rank, ("down", "up"), needed=("down", "up")),
    Kind("LoHa", _hadamard, _HADA := tuple(f"hada_{w}_{x}" for w in ("w1", "w2") for x in "ab"), needed=_HADA),
    Kind("LoKr", _kronecker, tuple(f"lokr_{w}{end}" for w in ("w1", "w2") for end in ("", "_a", "_b"))),
)
