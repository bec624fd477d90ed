"""Make videos from prompts. Without options, make those of prompts/shapes.txt with the Shapes model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.inference.options import STRENGTH, InferenceOptions
from utils.checkout import find_shipped
from utils.cli import exit_code, merged_overrides

DEFAULT_CONFIG = "configs/shapes/self_forcing_dmd.yaml"
# Options that set a key of the configuration: option -> key.
KEYS = {
    "checkpoint_path": "generator.weights",
    "output_folder": "inference.output_folder",
    "data_path": "inference.data_path",
    "num_output_frames": "video.num_frames",
    "seed": "inference.seed",
    "num_samples": "inference.num_samples",
    "fps": "video.fps",
    "device": "device",
    "dtype": "dtype",
    "vram": "vram",
}
# A test compares these words with the vocabulary in utils/shapes, which takes a second to import.
EPILOG = """\
The shipped Shapes model understands sentences of this form:
  a SIZE COLOUR SHAPE moving DIRECTION on a BACKGROUND background
  SIZE        small, large
  COLOUR      red, green, blue, yellow, purple, cyan
  SHAPE       circle, square, triangle
  DIRECTION   up and right, up and left, down and right, down and left
  BACKGROUND  black, navy, gray, white

If a default is the name of a key, its value comes from the configuration file; --dry-run prints all values.
docs/inference.md explains the names of the files, which videos are skipped, and what happens if a run is stopped.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; None is that of this process."""
    return build_parser().parse_intermixed_args(arguments)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every option, its text, its unit and its default."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_prompt_options(parser)
    _add_start_options(parser)
    _add_time_options(parser)
    _add_output_options(parser)
    _add_model_options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9"
    )
    return parser


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what the videos show").add_argument
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated; default: --data_path")
    add(
        "--data_path",
        metavar="FILE",
        help="file of prompts: text with one prompt a line, or .jsonl or .csv with a column 'prompt'; with --i2v, JSON "
        "lines with 'image' and 'prompt'; default: inference.data_path",
    )
    add(
        "--extended_prompt_path",
        metavar="FILE",
        help="file of long prompts: videos are made from line N of this file and named after line N of --data_path; "
        "default: videos are made from --data_path",
    )
    add(
        "--prompt-extend",
        action="store_true",
        help="let a text model write the long prompts; PROMPT_EXTEND_URL and PROMPT_EXTEND_MODEL name its server; "
        "default: off",
    )
    add(
        "--seed",
        metavar="N",
        help="seed of the noise, a whole number; -1 draws a random seed and records it; default: inference.seed",
    )
    add("--num_samples", metavar="N", help="number of videos for each prompt; default: inference.num_samples")


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images and videos to start from").add_argument
    add("--i2v", action="store_true", help="start each video from the image that --data_path names; default: off")
    add(
        "--extend",
        metavar="VIDEO",
        help="continue this video; --num_output_frames then counts only the added latent frames; default: none",
    )
    add("--v2v", metavar="VIDEO", help="follow this video, which also gives the length; default: none")
    add(
        "--strength",
        type=float,
        metavar="X",
        help=f"how much --v2v may differ from its video: above 0, at most 1; default: {STRENGTH}",
    )


def _add_time_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("length and changes").add_argument
    add(
        "--num_output_frames",
        metavar="N",
        help="length in latent frames; N of them are 1 + 4 (N - 1) frames of the file; default: video.num_frames",
    )
    add("--fps", metavar="X", help="frames per second of the files, such as 16 or 23.976; default: video.fps")
    add(
        "--switch",
        action="append",
        metavar="'12s: PROMPT'",
        help="change the prompt at this second; may be repeated; default: none",
    )
    add(
        "--switch_style",
        metavar="STYLE",
        help="how a switch treats the frames before it: recache, keep, blend or cut; default: recache",
    )
    add(
        "--storyboard",
        metavar="FILE",
        help="YAML file, a list of {at: 12s, prompt: a cat, style: recache}; at: 0s replaces --prompt; default: none",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--output_folder", metavar="FOLDER", help="folder for the videos; default: inference.output_folder")
    add(
        "--save_with_index",
        action="store_true",
        help="name files after the number of the prompt, as the official code does; default: after the prompt",
    )
    add("--overwrite", action="store_true", help="make existing videos again; default: keep them")
    add("--dry-run", action="store_true", help="print the whole configuration and stop; default: off")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and machine").add_argument
    add(
        "--config_path",
        type=find_shipped,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="YAML file with the settings; default: %(default)s",
    )
    add(
        "--checkpoint_path",
        metavar="PATH",
        help="weights of the generator: a folder, a .safetensors or a .pt file; default: generator.weights",
    )
    add(
        "--use_ema",
        action="store_true",
        help="use the averaged weights if a checkpoint holds both; default: generator.use_ema, or the raw ones",
    )
    add(
        "--download",
        action="store_true",
        help="first download missing published weights from the Hugging Face hub; default: off",
    )
    add("--device", metavar="NAME", help="auto, cuda, cuda:N, mps or cpu; default: device")
    add("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16; default: dtype")
    add(
        "--vram",
        metavar="GB",
        help="gigabytes of the device's memory (RAM on a CPU) that may be used; default: all free memory",
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Make the videos that the arguments ask for."""
    overrides = merged_overrides(args, KEYS)
    keys = {text.partition("=")[0]: text.partition("=")[2] for text in args.overrides}
    names = InferenceOptions.__dataclass_fields__.keys() & vars(args).keys()
    values = {name: getattr(args, name) for name in names} | {
        "data_path": args.data_path or keys.get(KEYS["data_path"])
    }
    chosen = args.num_output_frames is not None or KEYS["num_output_frames"] in keys
    options = InferenceOptions(length_chosen=chosen, **values)
    with _starting():
        from pipeline.inference.run import main as make_videos
    make_videos(args.config_path, overrides, options, dry_run=args.dry_run)


@contextmanager
def _starting() -> Iterator[None]:
    """Show on a terminal that the program starts, until its modules are imported."""
    shown = sys.stderr.isatty()
    if shown:
        print("starting ...", end="", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
