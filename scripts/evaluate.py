"""Measure a checkpoint: a Shapes one with the detector on held-out prompts, any one with --vbench; print a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="weights of the generator or the teacher: folder, .safetensors or .pt")
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add(
        "--sampler",
        choices=("rollout", "teacher"),
        default="rollout",
        help="few-step rollout, or many bidirectional steps",
    )
    add("--prompts", type=int, default=96, help="held-out prompts measured")
    add("--lengths", type=int, nargs="+", default=[1, 4], help="multiples of the training length")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=16)
    add("--output_folder", default="logs/evaluate", help="for the JSON table and the contact sheets")
    add("overrides", nargs="*", metavar="key=value")
    add = parser.add_argument_group("videos for VBench, of any model").add_argument
    add("--vbench", metavar="FOLDER", help="make 5 videos a prompt in VBench's names and measure them; default: off")
    add("--data_path", metavar="FILE", help="prompts, one a line: VBench's all_dimension.txt")
    add("--extended_prompt_path", metavar="FILE", help="long prompts, paired line by line with --data_path")
    add("--vbench_info", metavar="FILE", help="VBench_full_info.json, for VBench's own prompts; default: other prompts")
    add("--dimensions", metavar="NAME,NAME", help="what VBench scores, with commas; default: all that it can")
    add("--long", action="store_true", help="cut the videos into clips of 2 s and score them as VBench-Long does")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from scripts.runs.evaluate import run as measure

    measure(args)


if __name__ == "__main__":
    sys.exit(main())
