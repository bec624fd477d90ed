"""Decides where a run starts: from a checkpoint of an earlier run, or from the beginning."""

from __future__ import annotations

from pathlib import Path

from trainer.config import Objective
from utils.checkpoint import read_about
from utils.checkpoint_search import find_good_checkpoint, put_away
from utils.distributed import Ranks, broadcast_value
from utils.errors import UserError

CHECKPOINTS = "checkpoints"
"""The name of the checkpoint folder inside the folder of a run."""
MADE_BY_RUNS = ("model", "model.pt", "samples")
"""Files that a new run renames, in addition to checkpoints and metrics."""


def find_checkpoint(logdir: Path, objective: Objective, ranks: Ranks, *, anew: bool) -> tuple[Path | None, int]:
    """Return the verified checkpoint from which a run in ``logdir`` continues, and its step. All processes call it.

    With ``anew``, or without a checkpoint, the run starts from the beginning, and files of an earlier run are renamed.

    Raises:
        UserError: all checkpoints are damaged, or they belong to another objective.
    """
    folder = logdir / CHECKPOINTS
    path = None if anew else find_good_checkpoint(folder, ranks)
    if path is None:
        if ranks.is_main:
            for name in (CHECKPOINTS, *MADE_BY_RUNS) if anew else MADE_BY_RUNS:
                put_away(logdir / name)
        broadcast_value(None)  # no process writes there before this
        return None, 0
    about = read_about(path)
    if (other := about.get("config", {}).get("objective")) != objective.value:
        raise UserError(
            f"{path}: does not fit this run: objective (checkpoint: {other}, run: {objective.value}); use the "
            "configuration it was made with, another --logdir, or --no_resume, which keeps the earlier run under "
            "other names"
        )
    return path, about["step"]
