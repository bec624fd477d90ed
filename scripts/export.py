"""Write a transformer in another format: python scripts/export.py IN OUT --format diffusers --ema --dtype bfloat16"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = {
    "wan": "folder as Wan-AI publishes it",
    "official": "training checkpoint .pt as Self Forcing publishes it",
    "diffusers": "diffusers pipeline folder; whole if the text encoder, tokenizer and VAE are known (--parts)",
    "comfyui": "single .safetensors for ComfyUI",
    "safetensors": "single .safetensors with bare names",
    "peft": "peft adapter folder; IN is a LoRA in any key style",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("input", metavar="IN", help="weights in any format: folder, .safetensors or .pt")
    add("output", metavar="OUT", help="file or folder to write")
    formats = "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
    add("--format", required=True, choices=FORMATS, help=formats)
    add("--ema", action="store_true", help="averaged weights of a training checkpoint; without it the raw ones")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the written weights; default: as stored, bfloat16 for packed ones",
    )
    add("--lora", help="LoRA to merge first: PATH[:SCALE], or '[PATH:SCALE, ...]'")
    add(
        "--lora_scale",
        type=float,
        default=1.0,
        help="factor of the scales of the LoRA; 1 is as trained; default: %(default)s",
    )
    add("--parts", help="release folder that holds the other parts of a diffusers pipeline; default: IN")
    add("--shift", type=float, default=5.0, help="timestep shift of a diffusers pipeline; default: %(default)s")
    add("--preset", default="wan2.1-t2v-1.3b", help="sizes to try first if IN has no config.json; default: %(default)s")
    add("--shard_gb", type=float, default=10.0, help="largest file of a folder, in gigabytes; default: %(default)s")
    add("--overwrite", action="store_true", help="write over what OUT holds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from utils.errors import UserError

    source, target = Path(args.input), Path(args.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the input itself; name another output")
    if (target.is_file() or (target.is_dir() and any(target.iterdir()))) and not args.overwrite:
        raise UserError(f"{target}: exists; remove it, name another output, or give --overwrite")
    try:
        print(export_lora(args) if args.format == "peft" else export_transformer(args))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


def export_transformer(args: argparse.Namespace) -> str:
    """Write the transformer, read it back and compare. Return a line about it."""
    import torch

    from model.transformer import PRESETS
    from model.weights import check_finite, convert, weights_hash
    from model.weights.card import write_card
    from model.weights.lora import merge_loras
    from model.weights.lora_choice import load_loras
    from model.weights.transformer_read import open_transformer
    from model.weights.transformer_write import write_transformer
    from utils.errors import UserError

    if args.preset not in PRESETS:
        raise UserError(f"--preset={args.preset} is none of {', '.join(PRESETS)}")
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
    import torch

    from model.weights import convert, load_state_dict
    from utils.errors import UserError

    written = load_state_dict(path)
    for name in state.keys() | written.keys():
        if name not in state or name not in written:
            raise UserError(f"{path}: {name!r} was {'not written' if name in state else 'added'}; the disk may be full")
        expected = convert(state[name], dtype)
        if expected.dtype != written[name].dtype or not torch.equal(expected, written[name]):
            raise UserError(f"{path}: {name!r} reads back differently; the disk may be full or damaged")


def export_lora(args: argparse.Namespace) -> str:
    """Write a LoRA of any dialect for peft, read it back and compare. Return a line about it."""
    import torch

    from model.weights.lora import save_lora
    from model.weights.lora_read import load_lora
    from utils.errors import UserError

    lora = load_lora(args.input)
    save_lora(args.output, lora)
    written = load_lora(args.output)
    for (name, expected), (other, difference) in zip(lora.differences(), written.differences(), strict=True):
        if name != other or not torch.allclose(expected, difference):
            raise UserError(f"{args.output}: {name!r} reads back differently; the disk may be full or damaged")
    return f"{args.output}: LoRA of {len(lora.layers)} layers"


def write_pipeline(args: argparse.Namespace) -> str:
    """Write the other parts of a diffusers pipeline if a release folder has them. Return the end of the line."""
    from diffusers import UniPCMultistepScheduler
    from diffusers import __version__ as version

    from model.text_encoder import TextEncoder
    from model.wan_vae import WanVAE
    from model.weights import PARTS, find_part
    from utils.errors import UserError
    from utils.files import atomic_write_text

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
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.shift, num_train_timesteps=1000
    )
    scheduler.save_pretrained(target / "scheduler")
    has_pieces = (target / "tokenizer" / "spiece.model").is_file()
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": version,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast" if has_pieces else "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    atomic_write_text(target / "model_index.json", json.dumps(index, indent=2) + "\n")
    return f"; whole pipeline, with {', '.join(found)} of {release}"


if __name__ == "__main__":
    sys.exit(main())
