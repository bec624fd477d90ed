"""Run inference.py from its configuration to its files, in one process or in several."""

from __future__ import annotations

import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from pipeline import memory
from pipeline.config import RANDOM_SEED, PipelineConfig, load_pipeline_config
from pipeline.download import download_weights
from pipeline.inference.checks import check_weights, fit_length, warn_of_prompts
from pipeline.inference.folder import OutputFolder, Placement, settle_partials
from pipeline.inference.make import MadeVideo, make_video
from pipeline.inference.options import InferenceOptions
from pipeline.inference.plan import plan_jobs, prompts_of
from pipeline.inference.recipe import part_hashes
from pipeline.inference.records import append_record, complete_records, save_run
from pipeline.loading import needs_text_encoder
from pipeline.text_to_video import load_pipeline
from utils.cli import USER_ERROR
from utils.config import to_yaml
from utils.distributed import (
    Ranks,
    barrier,
    broadcast_value,
    init_distributed,
    only_one,
    processes_here,
    resolve_device,
    resolve_dtype,
    share,
    share_cores,
)
from utils.errors import UserError
from utils.files import ensure_writable_folder
from utils.locks import folder_lock
from utils.tracking import progress, setup_logging

log = logging.getLogger("inference")

SEED_BITS = 31
SIGNAL_EXIT = 128  # plus the signal's number: the exit code that a shell gives a program that a signal has ended
PLACEMENTS = TypeAdapter(list[Placement])


class EndedBySignal(SystemExit):
    """A signal has ended the run. The frames made so far are written."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(SIGNAL_EXIT + number)
        self.number = number

    def __str__(self) -> str:
        return f"ended by {self.number.name}"


def main(config_path: str, overrides: Sequence[str], options: InferenceOptions, *, dry_run: bool) -> None:
    """Read a configuration, and make its videos, or print it if ``dry_run``. Raises what :func:`run` raises."""
    config = load_pipeline_config(config_path, overrides)
    if dry_run:
        print(to_yaml(config), end="")
    else:
        run(config, options)


def run(config: PipelineConfig, options: InferenceOptions) -> list[Path]:
    """Make the videos that a configuration and the options ask for.

    Returns:
        the file of each video, in every process.

    Raises:
        UserError: an input is wrong or missing. Mistakes are found before anything heavy is loaded.
        EndedBySignal: Ctrl-C, SIGTERM or SIGHUP came. An unfinished video is kept under a partial name.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    share_cores(device)  # between denoising and decoding
    config = fit_length(config, options)
    folder = ensure_writable_folder(config.inference.output_folder)
    ranks = init_distributed(device.type)
    setup_logging(ranks.is_main)
    with only_one(folder_lock(folder, "inference.py"), ranks):
        if options.download:
            _in_main(ranks, lambda: download_weights(config))
        config = _with_seed(config)
        placements = PLACEMENTS.validate_python(_in_main(ranks, lambda: _place_videos(config, options, dtype)))
        parts = {"device": device, "dtype": dtype, "use_ema": config.generator.average(options.use_ema)}
        _make_videos(config, placements, parts, ranks)
        barrier()
        if ranks.is_main:
            complete_records(folder)
            save_run(config, placements, folder)
        barrier()  # keep the lock until every process has written its files
    return [placement.path for placement in placements]


def _in_main(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Run `work` in the main process. Return its result (JSON) in every process. If it fails, the others just end."""
    result = failure = None
    if ranks.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    result, failed = broadcast_value((result, failure is not None))
    if failed:
        raise failure or SystemExit(USER_ERROR)
    return result


def _with_seed(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration. If it asks for a random seed, draw one and set it."""
    if config.inference.seed != RANDOM_SEED:
        return config
    seed = broadcast_value(secrets.randbits(SEED_BITS))
    log.info("the seed of this run is %d; --seed %d makes these videos again", seed, seed)
    return replace(config, inference=replace(config.inference, seed=seed))


def _place_videos(config: PipelineConfig, options: InferenceOptions, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return every video of the run with its file, as JSON."""
    folder = Path(config.inference.output_folder)
    complete_records(folder)
    jobs = plan_jobs(config, options, dtype)
    check_weights(config, prompts_of(jobs), dtype)
    hashes = part_hashes(config, use_ema=config.generator.average(options.use_ema), dtype=dtype)
    output = OutputFolder(folder)
    placements = []
    for job in progress(jobs, "looking for existing videos", unit="video"):
        placement = output.place(replace(job, recipe=replace(job.recipe, weights=hashes)))
        if options.exact_names and placement.path.stem != placement.job.recipe.name:
            taken = folder / f"{placement.job.recipe.name}.mp4"
            raise UserError(f"{taken}: is a video of other weights or settings; choose another folder")
        if placement.exists and not options.overwrite:
            settle_partials(placement.path, placement.job.recipe, finished=True)  # left by a stopped --overwrite
        placements.append(replace(placement, exists=placement.exists and not options.overwrite))
    memory.check_disk(config, sum(not placement.exists for placement in placements))
    return PLACEMENTS.dump_python(placements, mode="json")


def _announce(config: PipelineConfig, placements: Sequence[Placement]) -> None:
    """Log what will be made, after all checks."""
    warn_of_prompts(config.text_encoder, prompts_of([placement.job for placement in placements]))
    missing = [placement for placement in placements if not placement.exists]
    renamed = [placement.path for placement in missing if placement.path.stem != placement.job.recipe.name]
    if renamed:
        log.info(
            "%d file names belong to other videos, which are kept; the new names are %s ...",
            len(renamed),
            renamed[0].name,
        )
    if len(missing) < len(placements):
        existing = len(placements) - len(missing)
        log.info("%d of %d videos exist already; --overwrite makes them again", existing, len(placements))
    folder, latents = config.inference.output_folder, config.video.num_frames
    log.info("making %d video%s of %d latent frames in %s", len(missing), "s"[: len(missing) != 1], latents, folder)


def _make_videos(config: PipelineConfig, placements: Sequence[Placement], parts: dict[str, Any], ranks: Ranks) -> None:
    """Load the pipeline and make this process's share of the videos. `parts` says how weights are loaded."""
    missing = [placement for placement in placements if not placement.exists]
    together = config.optimize.sequence_parallel  # then all processes make each video
    mine = missing if together else share(missing, ranks.rank, ranks.world_size)
    prompts = prompts_of([placement.job for placement in mine])
    chosen = None
    if mine:
        text = needs_text_encoder(config, prompts, parts["dtype"])
        chosen = memory.plan(config, text=text, processes=processes_here(ranks), **parts)
    if ranks.is_main:
        _announce(config, placements)
    if chosen is None:
        return
    log.info(chosen.line)
    pipeline = load_pipeline(config, profile=chosen.profile, prompts=prompts, **parts)
    writes = ranks.is_main or not together
    total = len(mine) * pipeline.codec.num_frames(config.video.num_frames)
    with progress(total, "frames", unit="frame", is_main=ranks.is_main) as bar:
        for placement in mine:
            made = make_video(pipeline, placement, config, bar, writes=writes)
            if made.finished and made.frames and writes:
                _record(config, placement, made)
            if made.signal is not None:
                raise EndedBySignal(made.signal)


def _record(config: PipelineConfig, placement: Placement, made: MadeVideo) -> None:
    append_record(config, placement, frames=made.frames, seconds=made.seconds)
    speed = made.frames / made.seconds
    log.info("%s  %d frames in %.2f s, %.1f frames/s", placement.path, made.frames, made.seconds, speed)
