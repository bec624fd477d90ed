"""Every on-disk weight format ↔ our parameter names (the original Wan ones): strict, safe, memory-mapped.

Bytes are read by `weight_files` and written by `weight_writers`. What they mean is said by tables; a further format is
a further row: `WEIGHT_FILES` (what a folder may hold), `PARTS` (what a release calls its parts), `WRAPPER_SEGMENTS`
(name parts that wrappers add), `FOREIGN_NAMES` (other libraries' parameter names), `DOWNLOADS` (published files).
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.weight_files import StateDict, find_part, not_found, plain_name, read_config, read_file, read_folder
from model.weight_writers import save_folder
from utils.errors import UserError

__all__ = [
    "StateDict",
    "check_finite",
    "check_fit",
    "count_layers",
    "diffusers_to_wan",
    "find_part",
    "load_into",
    "load_state_dict",
    "not_found",
    "read_config",
    "rename_keys",
    "save_folder",
    "strip_wrappers",
    "wan_to_diffusers",
    "weights_hash",
]

# Rows of (name here, name there); each `*` stands for one dotted segment and must occur equally often on both sides.
KeyMap = tuple[tuple[str, str], ...]
COMFYUI_PREFIX = "model.diffusion_model."

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


def load_state_dict(path: str | Path, *, use_ema: bool | None = None) -> StateDict:
    """Read weights in any known format, under our names, memory-mapped on the CPU and in the dtype they are stored in.

    Args:
        path: a folder (config.json beside model.safetensors or diffusion_pytorch_model.safetensors, single or sharded
            with an index; or a diffusers pipeline, for its transformer), a .safetensors file (bare, with any wrapper's
            prefix, or ComfyUI's), or a PyTorch file holding a bare state dict, {"state_dict": ...}, {"model": ...} or a
            training checkpoint {"generator", "critic", "generator_ema"}.
        use_ema: which generator a training checkpoint gives: the averaged one, the raw one, or (None) the averaged one
            where there is one; formats with a single set of weights ignore it.

    Raises:
        UserError: one line naming the file, for anything missing, damaged, unsafe or without weights.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path)
    path = find_part(path, "transformer")
    state = strip_wrappers(read_folder(path) if path.is_dir() else read_file(path, use_ema=use_ema), source=str(path))
    for marker, key_map in FOREIGN_NAMES.items():
        if marker in state:
            return rename_keys(state, key_map, source=str(path))
    return state


def strip_wrappers(state: StateDict, *, source: str) -> StateDict:
    """Drop the name segments that wrappers add; of a whole ComfyUI checkpoint keep the diffusion model alone."""
    if any(key.startswith(COMFYUI_PREFIX) for key in state):
        state = {key: tensor for key, tensor in state.items() if key.startswith(COMFYUI_PREFIX)}
    stripped: StateDict = {}
    for key, tensor in state.items():
        name = plain_name(key)
        if name in stripped:
            raise UserError(f"{source}: two tensors are called {name!r} once wrapper prefixes are dropped")
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


def load_into(
    module: nn.Module,
    state: StateDict,
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Give `module` (on the meta device or not) the tensors of `state`: strictly, and without a second copy.

    Args:
        state: is emptied, so that what a tensor was converted from is free as soon as it is converted.
        source: what the tensors came from, for the error message.
        dtype: converts floating-point tensors one by one; None keeps the dtype they are stored in.
        device: where to put them; None leaves them where they are.

    Raises:
        UserError: names the first three tensors that are missing, unexpected or of another shape, with both shapes;
            or the first that holds NaN or infinity, in `dtype`.
    """
    check_fit(module, state, source=source)
    converted: StateDict = {}
    for key in list(state):
        tensor = state.pop(key)
        converted[key] = tensor.to(device or tensor.device, dtype if tensor.is_floating_point() else None)
        check_finite(converted[key], f"{source}: the tensor {key!r}")
    module.load_state_dict(converted, strict=True, assign=True)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str, hint: str = "") -> None:
    """Raise UserError, naming three tensors with both shapes, where names and shapes are not those of `module`; or
    the first tensor that holds whole numbers in place of floating-point ones, as quantised weights do."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = [
        f"{key} (file: {given.get(key, 'missing')}, model: {expected.get(key, 'not in it')})"
        for key in {**expected, **given}
        if given.get(key) != expected.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit {type(module).__name__}: {'; '.join(wrong[:3])}{more}{hint}")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise UserError(
                f"{source}: the tensor {key!r} is stored as {state[key].dtype}; use weights in float or bfloat16"
            )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise UserError where there is NaN or infinity; takes no memory, and does not look into 8-bit types."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.dtype.itemsize == 1:
        return
    low, high = tensor.detach().aminmax()
    if not (low.isfinite() & high.isfinite()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds NaN or infinity (as {dtype}); use an undamaged file")


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules `prefix`.0, `prefix`.1, ... the names mention."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


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
