"""Where a run starts: after a checkpoint of an earlier start, or anew."""

from __future__ import annotations

from pathlib import Path

from trainer.config import Objective
from utils.checkpoint import read_about
from utils.checkpoint_search import find_good_checkpoint, put_away
from utils.distributed import Ranks, broadcast_value
from utils.errors import UserError

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the folder of a run."""
MADE_BY_RUNS = ("model", "model.pt", "samples")
"""What a run that starts anew keeps under another name, besides checkpoints and metrics."""


def find_checkpoint(logdir: Path, objective: Objective, ranks: Ranks, *, anew: bool) -> tuple[Path | None, int]:
    """The verified checkpoint that a run in ``logdir`` goes on from, and its step. All processes call it.

    A run that starts anew, because ``anew`` asks for it or there is no checkpoint, renames what an earlier run left.

    Raises:
        UserError: no checkpoint is good, or they are of another objective.
    """
    folder = logdir / CHECKPOINTS
    path = None if anew else find_good_checkpoint(folder, ranks)
    if path is None:
        if ranks.is_main:
            for name in (CHECKPOINTS, *MADE_BY_RUNS) if anew else MADE_BY_RUNS:
                put_away(logdir / name)
        broadcast_value(None)  # nobody makes anything there before
        return None, 0
    about = read_about(path)
    if (other := about.get("config", {}).get("objective")) != objective.value:
        raise UserError(
            f"{path}: does not fit this run: objective (checkpoint: {other}, run: {objective.value}); use the "
            "configuration it was made with, another --logdir, or --no_resume, which keeps the earlier run under "
            "other names"
        )
    return path, about["step"]
