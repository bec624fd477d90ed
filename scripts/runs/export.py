"""Writes a transformer or a LoRA in another format, reads it back and compares."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.text_encoder import TextEncoder
from model.transformer import PRESETS
from model.wan_vae import WanVAE
from model.weights import PARTS, check_finite, convert, find_part, load_state_dict, weights_hash
from model.weights.card import write_card
from model.weights.diffusers_folder import write_index
from model.weights.lora import merge_loras, save_lora
from model.weights.lora_choice import load_loras
from model.weights.lora_read import load_lora
from model.weights.transformer_read import open_transformer
from model.weights.transformer_write import write_transformer
from utils.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Write OUT and print a line about it. Raises UserError if IN or the LoRA cannot be read."""
    print(export_lora(args) if args.format == "peft" else export_transformer(args))


def export_transformer(args: argparse.Namespace) -> str:
    """Write the transformer, read it back and compare. Return a line about it."""
    if args.preset not in PRESETS:
        raise UserError(f"--preset={args.preset} is not one of {', '.join(PRESETS)}")
    loras = load_loras(args.lora, args.lora_scale)
    model, state = open_transformer(args.input, preset=args.preset, use_ema=args.ema)
    merge_loras(state, loras)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    for name, tensor in state.items():
        check_finite(convert(tensor, dtype), f"{args.input}: the tensor {name!r}")
    write_transformer(
        args.output, state, model.config, format=args.format, dtype=dtype, shard_bytes=int(args.shard_gb * 1e9)
    )
    parts = write_pipeline(args) if args.format == "diffusers" else ""
    check_reload(args.output, state, dtype)
    size = sum(tensor.numel() for tensor in state.values())
    if Path(args.output).is_dir():
        about = f"Weights of a causal video transformer in the layout {args.format!r}."
        write_card(args.output, model.config, parameters=size, source=args.input, about=about)
    return f"{args.output}: {size / 1e6:.1f}M parameters in {len(state)} tensors, {weights_hash(args.output)}{parts}"


def check_reload(path: str, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Read back what was written and compare every tensor."""
    written = load_state_dict(path)
    for name in state.keys() | written.keys():
        if name not in state or name not in written:
            raise UserError(f"{path}: {name!r} was {'not written' if name in state else 'added'}; the disk may be full")
        expected = convert(state[name], dtype)
        if expected.dtype != written[name].dtype or not torch.equal(expected, written[name]):
            raise UserError(f"{path}: {name!r} reads back differently; the disk may be full or damaged")


def export_lora(args: argparse.Namespace) -> str:
    """Write a LoRA of any dialect for peft, read it back and compare. Return a line about it."""
    lora = load_lora(args.input)
    save_lora(args.output, lora)
    written = load_lora(args.output)
    for (name, expected), (other, difference) in zip(lora.differences(), written.differences(), strict=True):
        if name != other or not torch.allclose(expected, difference):
            raise UserError(f"{args.output}: {name!r} reads back differently; the disk may be full or damaged")
    return f"{args.output}: LoRA of {len(lora.layers)} layers"


def write_pipeline(args: argparse.Namespace) -> str:
    """Write the other parts of a diffusers pipeline if a release folder has them. Return the end of the line."""
    release, target = Path(args.parts or args.input), Path(args.output)
    found = {part: find_part(release, part) for part in PARTS if part != "transformer"}
    if absent := [part for part, path in found.items() if path == release]:
        if args.parts:
            raise UserError(f"--parts={release} holds no {absent[0]}; give a Wan2.1 or a diffusers folder")
        return "; transformer only (--parts adds the rest)"
    WanVAE.from_file(found["vae"]).vae.save_pretrained(target / "vae")
    encoder = TextEncoder.from_files(found["text_encoder"], tokenizer=found["tokenizer"])
    encoder.model.save_pretrained(target / "text_encoder")
    shutil.copytree(found["tokenizer"], target / "tokenizer", dirs_exist_ok=True)
    has_pieces = (target / "tokenizer" / "spiece.model").is_file()
    write_index(target, tokenizer="T5TokenizerFast" if has_pieces else "PreTrainedTokenizerFast", shift=args.shift)
    return f"; whole pipeline, with {', '.join(found)} of {release}"
