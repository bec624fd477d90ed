"""Write a transformer or a LoRA in another format: python scripts/export.py IN OUT --format diffusers --ema"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code, finite, positive
from utils.errors import UserError

FORMATS = {
    "wan": "a folder as Wan-AI publishes it",
    "official": "a training checkpoint .pt as Self Forcing publishes it",
    "diffusers": "a diffusers pipeline folder, whole if the text encoder, tokenizer and VAE are known (--parts)",
    "comfyui": "one .safetensors file for ComfyUI",
    "safetensors": "one .safetensors file with names without a prefix",
    "peft": "a peft adapter folder; IN is a LoRA of any trainer",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("input", metavar="IN", help="weights in any format: folder, .safetensors or .pt")
    add("output", metavar="OUT", help="file or folder to write")
    formats = "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
    add("--format", required=True, choices=FORMATS, help=formats)
    add("--ema", action="store_true", help="write the averaged weights of a training checkpoint; default: the raw ones")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the written weights; default: the stored type, or bfloat16 for packed weights",
    )
    add("--lora", help="LoRA to merge first: PATH[:SCALE], or '[PATH:SCALE, ...]'; default: none")
    add(
        "--lora_scale",
        type=finite,
        default=1.0,
        help="factor of all LoRA scales; 1 is as trained; default: %(default)s",
    )
    add("--parts", help="folder with the other parts of a diffusers pipeline; default: IN")
    add("--shift", type=positive, default=5.0, help="timestep shift of a diffusers pipeline; default: %(default)s")
    add(
        "--preset", default="wan2.1-t2v-1.3b", help="preset to try first if IN has no config.json; default: %(default)s"
    )
    add("--shard_gb", type=positive, default=10.0, help="largest file of a folder, in gigabytes; default: %(default)s")
    add("--overwrite", action="store_true", help="replace OUT if it exists; default: off")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    source, target = Path(args.input), Path(args.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the input itself; name another output")
    if (target.is_file() or (target.is_dir() and any(target.iterdir()))) and not args.overwrite:
        raise UserError(f"{target}: exists; remove it, name another output, or give --overwrite")
    from scripts.runs.export import run as export

    try:
        export(args)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    sys.exit(main())
