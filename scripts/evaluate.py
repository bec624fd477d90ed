"""Measure a checkpoint and print a table: a Shapes model with its detector, any model with --vbench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.checkout import find_shipped
from utils.cli import exit_code
from utils.errors import UserError

VBENCH_OPTIONS = ("data_path", "extended_prompt_path", "vbench_info", "dimensions", "long")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=find_shipped, required=True,
        help="weights of the generator or the teacher: folder, .safetensors or .pt; required")  # fmt: skip
    add(
        "--config_path",
        type=find_shipped,
        default="configs/shapes/self_forcing_dmd.yaml",
        help="YAML file; default: %(default)s",
    )
    add("--use_ema", action="store_true", help="use the averaged weights if a checkpoint holds both; "
        "default: generator.use_ema, or the raw ones")  # fmt: skip
    add(
        "--sampler",
        choices=("rollout", "teacher"),
        default="rollout",
        help="rollout: few steps, chunk by chunk; teacher: many bidirectional steps; default: %(default)s",
    )
    add("--prompts", type=int, default=96, help="number of held-out prompts; default: %(default)s")
    add("--lengths", type=int, nargs="+", default=[1, 4],
        help="lengths of the videos, as multiples of the training length; default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the noise; default: %(default)s")
    add("--batch", type=int, default=16, help="videos made at the same time; default: %(default)s")
    add("--output_folder", default="logs/evaluate",
        help="folder for the JSON table and the contact sheets; default: %(default)s")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9")
    add = parser.add_argument_group("videos for VBench, of any model").add_argument
    add("--vbench", metavar="FOLDER", help="make 5 videos for each prompt, with VBench's file names, and measure "
        "them; default: off")  # fmt: skip
    add("--data_path", metavar="FILE", help="prompts, one a line, such as VBench's all_dimension.txt; "
        "default: none, needed with --vbench")  # fmt: skip
    add("--extended_prompt_path", metavar="FILE", help="long prompts to generate from; line N belongs to line N of "
        "--data_path; default: none")  # fmt: skip
    add("--vbench_info", metavar="FILE", help="VBench_full_info.json, if the prompts are VBench's own; default: none")
    add("--dimensions", metavar="NAME,NAME", help="the dimensions that VBench scores, separated by commas; "
        "default: all that it can score for these prompts")  # fmt: skip
    add("--long", action="store_true", help="cut the videos into clips of 2 seconds and score these, as VBench-Long "
        "does; default: off")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    given = [name for name in VBENCH_OPTIONS if getattr(args, name)]
    if given and args.vbench is None:
        raise UserError(f"--{given[0]} belongs to --vbench FOLDER; add it, or leave --{given[0]} out")
    from scripts.runs.evaluate import run as measure

    measure(args)


if __name__ == "__main__":
    sys.exit(main())
