"""Encodes every prompt that a training needs."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pipeline.loading import load_text_encoder
from scripts.runs.shard_job import begin
from trainer.config import Config
from trainer.data import training_prompts
from utils.distributed import share
from utils.prompts import read_prompts
from utils.seeds import derive_seed
from utils.shards import ShardWriter
from utils.tracking import progress


def run(args: argparse.Namespace) -> None:
    """Encode every prompt that is not in the folder yet. Raises UserError if something cannot be used."""
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
    print(f"{job.folder}: {len(missing)} prompts encoded, {len(mine) - len(missing)} were there already")


def wanted_prompts(config: Config, files: list[str]) -> list[str]:
    """Return every prompt that a training needs and those of more files, each one once.

    Raises:
        UserError: a file is missing or holds no prompts.
    """
    prompts = training_prompts(config.data, config.video)
    for file in (config.data.sample_prompts, *files):
        prompts = [*prompts, *read_prompts(file)]
    return list(dict.fromkeys([*prompts, config.sampling.negative_prompt]))
