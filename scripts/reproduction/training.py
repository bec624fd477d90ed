"""Runs the trainings of a plan, one after another. A finished one is kept, and a stopped one goes on."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

from scripts.reproduction.plan import Training
from utils.errors import UserError
from utils.signals import StopSignals

logger = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parents[2]
AVERAGES = 5  # the averaged weights cover the last fifth of a training, in every method
SHORT = 8  # warm-up and the critic's head start take at most this fraction (1/SHORT) of the updates


def weights_of(folder: Path, name: str) -> Path:
    """Return the folder of the trained generator."""
    return folder / "train" / name / "model" / "generator"


def train_all(trainings: tuple[Training, ...], folder: Path, overrides: tuple[str, ...]) -> None:
    """Run every training that is not finished, in its order.

    Raises:
        UserError: a training failed.
    """
    for index, training in enumerate(trainings):
        place = f"{index + 1}/{len(trainings)} {training.name}"
        if weights_of(folder, training.name).is_dir():
            logger.info("%s: trained already", place)
            continue
        logger.info("%s: %d updates", place, training.steps)
        for command in commands(training, folder, overrides):
            run_program(command, training.name)


def commands(training: Training, folder: Path, overrides: tuple[str, ...] = ()) -> list[list[str]]:
    """Return the commands of a training: its pairs, if it needs any, then train.py."""
    config, keys = f"configs/shapes/{training.config}.yaml", [*_keys(training, folder), *overrides]
    made = []
    if training.pairs is not None:
        made.append(["scripts/make_ode_pairs.py", "--config_path", config, *training.pairs, *keys])
    logdir = str(folder / "train" / training.name)
    made.append(["train.py", "--config_path", config, "--logdir", logdir, "--no_visualize", *keys])
    return made


def _keys(training: Training, folder: Path) -> list[str]:
    """Return the overrides of a training."""
    short = max(1, training.steps // SHORT)
    keys = [f"trainer.steps={training.steps}", f"trainer.seed={training.seed}", "trainer.save_every=20"]
    keys.append(f"trainer.ema_decay={max(0.0, 1 - AVERAGES / training.steps):.3f}")
    keys += ["trainer.export_dtype=float16", f"optimizer.warmup_steps={short}", *training.overrides]
    section = "generator"
    if training.config.startswith(("self_forcing", "causvid")):
        section, keys = "student", [*keys, f"dmd.critic_head_start={min(10, short)}"]
    if training.config == "causal_consistency":
        section = "student"
    if training.start is not None:
        weights = weights_of(folder, training.start)
        keys.append(f"{section}.weights={weights}")
        if training.config in ("causal_ode", "causal_consistency"):
            keys.append(f"real_score.weights={weights}")
    if training.pairs is not None:
        keys.append(f"ode.pairs={folder / 'pairs' / training.name}")
    return keys


def run_program(command: list[str], name: str) -> None:
    """Run a Python program of this repository, whose output is this program's. A signal to end is passed on to it.

    Raises:
        UserError: the program failed.
        SystemExit: a signal came. The program has saved its state by then.
    """
    process: subprocess.Popen | None = None

    def pass_on(_: signal.Signals) -> None:
        if process is not None:
            process.terminate()

    with StopSignals(on_signal=pass_on) as stop:
        # The program gets its own session, so that Ctrl-C in a terminal reaches it only once, through this process.
        process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, start_new_session=True)
        if stop.received:
            process.terminate()
        code = process.wait()
    if stop.received:
        logger.info("%s: stopped; run the same command again to go on", name)
        raise SystemExit(128 + stop.received)
    if code:
        raise UserError(
            f"{name}: {' '.join(command[:3])} ended with code {code}; correct what it says and run reproduce.sh again: "
            "it goes on from here"
        )
