"""Encode every prompt a training will ask for, once, into the folder data.embeddings; then it needs no text encoder.

Run it again to go on after an interruption, or to add the prompts of another configuration to the same folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml")
    add("--prompts", action="append", default=[], metavar="FILE", help="one more prompt file; may be given again")
    add("--shard_size", type=int, default=1024, help="prompts a file; an interruption loses at most as many")
    add("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from pipeline.loading import load_text_encoder
    from trainer.config import Config
    from trainer.data import all_prompts
    from utils.config import load_config
    from utils.distributed import derive_seed, init_distributed, resolve_device, resolve_dtype, share
    from utils.errors import UserError
    from utils.prompts import read_prompts
    from utils.shards import ShardWriter
    from utils.tracking import progress

    config = load_config(Config, args.config_path, args.overrides)
    folder = config.data.embeddings
    if folder is None:
        raise UserError("data.embeddings is null; name the folder to fill: data.embeddings=FOLDER")
    if args.shard_size < 1:
        raise UserError(f"--shard_size={args.shard_size} must be at least 1")
    files = [config.data.sample_prompts, *args.prompts]
    prompts = all_prompts(config.data, config.video) + [prompt for file in files for prompt in read_prompts(file)]
    prompts = list(dict.fromkeys([*prompts, config.sampling.negative_prompt]))
    device = resolve_device(config.device)
    ranks = init_distributed(device.type)
    dtype = resolve_dtype(config.dtype, device)
    encoder = load_text_encoder(config.text_encoder, device=device, dtype=dtype)
    about = {"dim": encoder.dim, "text_len": encoder.text_len, "encoder": Path(config.text_encoder.weights).name}
    with ShardWriter(folder, about, shard_size=args.shard_size) as writer, torch.no_grad():
        mine = {derive_seed(prompt): prompt for prompt in share(prompts, ranks.rank, ranks.world_size)}
        missing = {item: mine[item] for item in writer.remaining(mine)}
        for item, prompt in progress(missing.items(), "prompts", unit="prompt", is_main=ranks.is_main):
            (embeds,) = encoder.encode([prompt])
            length = int(embeds.any(dim=1).nonzero().max()) + 1
            writer.add(item, {"prompt": prompt}, {"embeds": embeds[:length]})
    print(f"{len(missing)} prompts encoded, {len(mine) - len(missing)} were there already, in {folder}")


if __name__ == "__main__":
    sys.exit(main())
