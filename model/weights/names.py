"""Names of tensors: the names that other libraries use, and the prefixes that wrappers add."""

import re
from collections.abc import Mapping

from torch import Tensor

from model.weights.mapping import StateDict
from utils.errors import UserError

# Rows of (name here, name there). Each `*` is one part of a name between dots. Both sides have the same number of them.
KeyMap = tuple[tuple[str, str], ...]
COMFYUI_PREFIX = "model.diffusion_model."
# Parts that wrappers add anywhere in a name, and parts that they add before it.
INNER_SEGMENTS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
WRAPPER_SEGMENTS = {"model", "module", "diffusion_model", *INNER_SEGMENTS}
# Tensors that every transformer or text encoder has. Whatever stands before them is a prefix, such as "transformer.".
ANCHORS = (
    "patch_embedding.weight",
    "condition_embedder.time_proj.weight",
    "token_embedding.weight",
    "shared.weight",
    "token_embd.weight",
    "encoder.final_layer_norm.weight",
)

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
# A tensor that only files of one library have → how its names become ours.
# GGUF of llama.cpp's T5 encoder, as city96 publishes UMT5 -> transformers' UMT5EncoderModel.
GGUF_T5_TO_TRANSFORMERS: KeyMap = (
    ("token_embd.weight", "shared.weight"),
    ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
    ("enc.blk.*.attn_norm.weight", "encoder.block.*.layer.0.layer_norm.weight"),
    *((f"enc.blk.*.attn_{x}.weight", f"encoder.block.*.layer.0.SelfAttention.{x}.weight") for x in "qkvo"),
    ("enc.blk.*.attn_rel_b.weight", "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("enc.blk.*.ffn_norm.weight", "encoder.block.*.layer.1.layer_norm.weight"),
    ("enc.blk.*.ffn_gate.weight", "encoder.block.*.layer.1.DenseReluDense.wi_0.weight"),
    ("enc.blk.*.ffn_up.weight", "encoder.block.*.layer.1.DenseReluDense.wi_1.weight"),
    ("enc.blk.*.ffn_down.weight", "encoder.block.*.layer.1.DenseReluDense.wo.weight"),
)

FOREIGN_NAMES: dict[str, KeyMap] = {
    "condition_embedder.time_proj.weight": tuple((ours, theirs) for theirs, ours in WAN_TO_DIFFUSERS),
    "token_embedding.weight": WAN_T5_TO_TRANSFORMERS,
    "token_embd.weight": GGUF_T5_TO_TRANSFORMERS,
}


def rename_keys(state: Mapping[str, Tensor], key_map: KeyMap, *, source: str = "state dict") -> StateDict:
    """Rename every tensor by the row that matches it. Raises UserError for a tensor that no row matches."""
    rows = [(re.compile(re.escape(old).replace(r"\*", r"([^.]+)")), new.replace("*", "{}")) for old, new in key_map]
    renamed: StateDict = {}
    for key, tensor in state.items():
        match, new = next(((m, new) for old, new in rows if (m := old.fullmatch(key))), (None, ""))
        if match is None:
            raise UserError(f"{source}: the tensor {key!r} {tuple(tensor.shape)} has no place in this kind of model")
        renamed[new.format(*match.groups())] = tensor
    return renamed


def wan_to_diffusers(state: Mapping[str, Tensor]) -> StateDict:
    """Rename tensors of an original Wan transformer to the names of diffusers' WanTransformer3DModel."""
    return rename_keys(state, WAN_TO_DIFFUSERS)


def diffusers_to_wan(state: Mapping[str, Tensor]) -> StateDict:
    """Rename tensors of diffusers' WanTransformer3DModel to the names of an original Wan transformer."""
    return rename_keys(state, FOREIGN_NAMES["condition_embedder.time_proj.weight"])


def strip_wrappers(state: StateDict, *, source: str) -> StateDict:
    """Remove the prefixes that wrappers, trainers and packers add to the names of tensors.

    If a checkpoint holds several models, as ComfyUI's do, only the diffusion model is kept.
    """
    if any(key.startswith(COMFYUI_PREFIX) for key in state):
        state = {key: tensor for key, tensor in state.items() if key.startswith(COMFYUI_PREFIX)}
    stripped: StateDict = {}
    for key, tensor in state.items():
        name = plain_name(key)
        if name in stripped:
            raise UserError(f"{source}: two tensors have the name {name!r} without their prefixes; use another file")
        stripped[name] = tensor
    prefix = _common_prefix(stripped, source)
    return {key.removeprefix(prefix): tensor for key, tensor in stripped.items() if key.startswith(prefix)}


def _common_prefix(state: Mapping[str, Tensor], source: str) -> str:
    """Return the prefix of the tensors: the text before a name that every model of a kind has, or ""."""
    if any(anchor in state for anchor in ANCHORS):
        return ""
    found = sorted({key.removesuffix(anchor) for key in state for anchor in ANCHORS if key.endswith(f".{anchor}")})
    if len(found) > 1:
        raise UserError(f"{source}: holds the models {', '.join(map(repr, found))}; give a file with one of them")
    return found[0] if found else ""


def plain_name(key: str) -> str:
    """Return a tensor's name without the parts that FSDP, DDP, torch.compile, checkpointing and wrapper classes add."""
    return ".".join(part for part in key.split(".") if part not in WRAPPER_SEGMENTS)


def without_wrappers(key: str) -> str:
    """Return a tensor's name without the parts that FSDP, torch.compile and checkpointing add inside it."""
    return ".".join(part for part in key.split(".") if part not in INNER_SEGMENTS)


def layer_numbers(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Return the numbers n of the modules `prefix`.n that the names mention, in ascending order."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d{{1,9}})\.", key) for key in state)
    return sorted({int(number[1]) for number in numbers if number})


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbered modules `prefix`.0, `prefix`.1, ... the names mention."""
    return len(layer_numbers(state, prefix))
