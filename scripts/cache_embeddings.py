"""Encode every prompt that a training asks for into the folder data.embeddings. Training then needs no text encoder.

Run it again to go on after an interruption, or to add the prompts of another configuration to the same folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.shard_job import begin, parse, shard_parser
from utils.cli import exit_code

if TYPE_CHECKING:
    from trainer.config import Config


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    config = "configs/shapes/self_forcing_dmd.yaml"
    parser = shard_parser(__doc__, config=config, items="prompts", shard_size=1024)
    parser.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="FILE",
        help="one more prompt file; may be repeated",
    )
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from pipeline.loading import load_text_encoder
    from utils.distributed import derive_seed, share
    from utils.shards import ShardWriter
    from utils.tracking import progress

    prompts: list[str] = []
    job = begin(args, "data.embeddings", check=lambda config: prompts.extend(wanted_prompts(config, args.prompts)))
    encoder = load_text_encoder(job.config.text_encoder, device=job.device, dtype=job.dtype)
    weights = Path(job.config.text_encoder.weights).name
    about = {"dim": encoder.dim, "text_len": encoder.text_len, "encoder": weights}
    with ShardWriter(job.folder, about, shard_size=args.shard_size) as writer, torch.no_grad():
        mine = {derive_seed(prompt): prompt for prompt in share(prompts, job.ranks.rank, job.ranks.world_size)}
        missing = {item: mine[item] for item in writer.remaining(mine)}
        for item, prompt in progress(missing.items(), "prompts", unit="prompt", is_main=job.ranks.is_main):
            (embeds,) = encoder.encode([prompt])
            length = int(embeds.any(dim=1).nonzero().max()) + 1
            writer.add(item, {"prompt": prompt}, {"embeds": embeds[:length]})
    print(f"{len(missing)} prompts encoded, {len(mine) - len(missing)} were there already, in {job.folder}")


def wanted_prompts(config: Config, files: list[str]) -> list[str]:
    """Return every prompt that a training asks for, and those of more files, each once.

    Raises:
        UserError: a file is missing or holds no prompts.
    """
    from trainer.data import all_prompts
    from utils.prompts import read_prompts

    prompts = all_prompts(config.data, config.video)
    for file in (config.data.sample_prompts, *files):
        prompts = [*prompts, *read_prompts(file)]
    return list(dict.fromkeys([*prompts, config.sampling.negative_prompt]))


if __name__ == "__main__":
    sys.exit(main())
