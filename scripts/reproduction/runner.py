"""Runs a plan from the first training to the report, and says before it starts how long that takes on this machine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.transformer import PRESETS, WanTransformer
from scripts.reproduction.measuring import REAL, measure_method, measure_real, measured_file
from scripts.reproduction.plan import Budget, MethodRow, ReproductionPlan, Training, build_plan
from scripts.reproduction.report import write_reproduction
from scripts.reproduction.training import REPOSITORY, train_all, weights_of
from utils.distributed import resolve_device
from utils.errors import UserError
from utils.shapes import held_out_scenes
from utils.tracking import duration, setup_logging

logger = logging.getLogger(__name__)

# Times as multiples of one forward and backward pass over a batch of 16 clips, which is timed here before the start.
PER_UPDATE = {
    "diffusion_forcing": 1.3,
    "teacher_forcing": 2.7,
    "causvid": 2.2,
    "self_forcing_dmd": 2.6,
    "self_forcing_sid": 3.2,
    "self_forcing_gan": 3.2,
    "ode_regression": 1.2,
    "causal_ode": 2.7,
    "causal_consistency": 2.5,
}
PER_LENGTH = 0.08  # for each video, in each training length, the detector included
MANY_STEPS_FACTOR = 6.0
START_SECONDS = 12.0  # of every program


@dataclass(frozen=True)
class Estimate:
    """Seconds of what is left to do."""

    training: float
    measuring: float


def reproduce(
    budget: Budget, *, folder: Path | None, report: Path | None, plan_only: bool, overrides: tuple[str, ...]
) -> None:
    """Train, measure and report what a budget pays for. What a stopped run has finished is kept.

    Raises:
        UserError: the teacher is missing, a count has nothing to measure, or a training failed.
    """
    setup_logging()
    if not 1 <= budget.prompts <= (held_out := len(held_out_scenes())):
        raise UserError(f"--prompts={budget.prompts} must be from 1 to {held_out}, the number of held-out prompts")
    plan = build_plan(budget)
    folder = (folder or REPOSITORY / "logs" / "reproduction" / budget.name).absolute()
    _check_release()
    estimate = estimate_left(plan, folder, time_pass())
    logger.info(
        "%s: %d trainings and %d rows; about %s of training and %s of measuring are left on this machine",
        *(budget.name, len(plan.trainings), len(plan.rows)),
        *(duration(estimate.training), duration(estimate.measuring)),
    )
    if plan_only:
        return
    train_all(plan.trainings, folder, overrides)
    longest = max((row.lengths for row in plan.rows), key=max)
    measure_real(budget, folder, overrides, longest)
    for row in plan.rows:
        measure_method(row, budget, folder, overrides)
    asked = ["--quick"] if budget.name == "quick" else []
    form = budget.forms[0] if len(budget.forms) == 1 else "both"
    asked += [f"--form {form}", f"--seeds {len(budget.seeds)}", f"--prompts {budget.prompts}"]
    asked.append(
        "--rows all" if budget.main and budget.ablations else f"--rows {'main' if budget.main else 'ablations'}"
    )
    command = " ".join(["scripts/reproduce.sh", *asked, *overrides])
    page = write_reproduction(plan, folder, (report or folder / "report").absolute(), command)
    logger.info("the report is %s", page)


def _check_release() -> None:
    """Refuse to start without the models from which everything begins."""
    for part in ("teacher", "codec", "text_encoder"):
        if not (REPOSITORY / "checkpoints" / "shapes" / part).is_dir():
            raise UserError(f"checkpoints/shapes/{part} is missing: get it with git, or run scripts/train_shapes.sh")


def time_pass() -> float:
    """Return the seconds of one forward and backward pass over 16 clips of the Shapes model on this machine."""
    config, device = PRESETS["shapes"], resolve_device("auto")
    model = WanTransformer(config).to(device)
    latents = torch.randn(16, 9, config.in_dim, 12, 12, device=device)
    embeds = torch.randn(16, 12, config.text_dim, device=device)
    timesteps = torch.full((16, 9), 500.0, device=device)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model(latents, timesteps, embeds).square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def estimate_left(plan: ReproductionPlan, folder: Path, seconds: float) -> Estimate:
    """Return how long the unfinished parts of a plan take, if one pass takes ``seconds``."""
    training = sum(
        START_SECONDS + run.steps * _units(run) * seconds
        for run in plan.trainings
        if not weights_of(folder, run.name).is_dir()
    )
    videos = plan.budget.prompts * len(plan.budget.video_seeds)
    measuring = 0.0 if measured_file(folder, REAL, 0).is_file() else videos * 10 * PER_LENGTH * seconds
    for row in plan.rows:
        seeds = plan.budget.seeds[: len(row.trainings)]
        left = sum(not measured_file(folder, row.name, seed).is_file() for seed in seeds)
        measuring += left * (START_SECONDS + videos * _video_units(row) * seconds)
    return Estimate(training, measuring)


def _units(training: Training) -> float:
    smaller = any(override == "trainer.batch_size=8" for override in training.overrides)
    return PER_UPDATE[training.config] * (0.5 if smaller else 1.0)


def _video_units(row: MethodRow) -> float:
    many = any(override.startswith("sampler=") for override in row.overrides)
    return PER_LENGTH * sum(row.lengths) * (MANY_STEPS_FACTOR if many else 1.0)
