"""Weights on disk: read, check, rename, merge and write them. In memory, tensors have their original Wan names.

A new format or dialect is a new row of a table (see docs/weights.md):

| table | says |
|---|---|
| `paths.WEIGHT_FILES`, `paths.PARTS` | file names in a folder, names of the parts of a release |
| `published.REPOSITORIES` | where published files come from |
| `names.WRAPPER_SEGMENTS`, `names.FOREIGN_NAMES` | prefixes of wrappers, parameter names of other libraries |
| `lora_dialects` | how LoRA files name layers and matrices |
| `lora_read.KINDS`, `adapters` | kinds of adapters and their formulas |
| `scaled.SCALES` | names of the scales of 8-bit weights |
| `transformer_write.FORMATS` | formats to write |
"""

from model.weights.fit import check_finite, check_fit, load_into, weights_hash
from model.weights.mapping import StateDict
from model.weights.names import (
    WAN_T5_TO_TRANSFORMERS,
    KeyMap,
    count_layers,
    diffusers_to_wan,
    layer_numbers,
    rename_keys,
    wan_to_diffusers,
)
from model.weights.paths import CONFIG_FILE, PARTS, WEIGHT_FILES, find_part, read_config
from model.weights.published import not_found
from model.weights.read import load_state_dict, read_file
from model.weights.write import convert, save_folder, save_safetensors, save_torch

__all__ = [
    "CONFIG_FILE",
    "PARTS",
    "WAN_T5_TO_TRANSFORMERS",
    "WEIGHT_FILES",
    "KeyMap",
    "StateDict",
    "check_finite",
    "check_fit",
    "convert",
    "count_layers",
    "diffusers_to_wan",
    "find_part",
    "layer_numbers",
    "load_into",
    "load_state_dict",
    "not_found",
    "read_config",
    "read_file",
    "rename_keys",
    "save_folder",
    "save_safetensors",
    "save_torch",
    "wan_to_diffusers",
    "weights_hash",
]
