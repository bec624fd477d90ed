"""Finds the checkpoints of this program, and the one from which a run continues.

A folder counts as a checkpoint of this program only if its name is exactly `step_` and eight or more digits and it
holds a manifest of the same step. Everything else belongs to other programs or people, and is never deleted.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from utils.checkpoint_files import (
    MANIFEST_FILE,
    STATE_FILE,
    DamagedCheckpoint,
    read_manifest,
    read_state,
    stored_tensors,
    tensor_file,
    verify,
)
from utils.distributed import Ranks, broadcast_value, gather_values
from utils.errors import UserError
from utils.files import atomic_write_text, is_own_file, set_aside

log = logging.getLogger(__name__)

LATEST = "latest"
NAME = re.compile(r"step_(\d{8,})")
OWN_FILES = (MANIFEST_FILE, STATE_FILE, tensor_file(0))
ALONE = Ranks()
"""A single process."""


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a folder's name; None if it is not the name of a checkpoint."""
    match = NAME.fullmatch(folder.name)
    step = int(match[1]) if match else None
    return step if step is not None and checkpoint_name(step) == folder.name else None


def is_own(folder: Path) -> bool:
    """Return whether this program made the folder: it has a checkpoint's name and a manifest of the same step."""
    if not _is_candidate(folder):
        return False
    try:
        return read_manifest(folder).step == step_of(folder)
    except DamagedCheckpoint:
        return False


def own_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first. Their files are not verified."""
    return [each for each in _candidates(Path(folder)) if is_own(each)]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint that `latest` names, else the newest one, else None. It is not verified."""
    named, own = _named_by_latest(Path(folder)), own_checkpoints(folder)
    return next((each for each in own if each.name == named), own[-1] if own else None)


def find_good_checkpoint(folder: str | Path, ranks: Ranks = ALONE) -> Path | None:
    """Return the checkpoint to continue from, with verified files; None if there is none. All processes call it.

    It is the one that `latest` names. If this checkpoint or `latest` is damaged, it is the newest good one. Then one
    warning names both, and the damaged checkpoint is renamed.

    Raises:
        UserError: there are checkpoints, but no good one.
    """
    folder = Path(folder)
    named, tried = broadcast_value(_order_to_try(folder) if ranks.is_main else None)
    problems: dict[str, str] = {}
    for name in tried:
        problem = _problem(folder / name, ranks)
        if problem is None:
            if ranks.is_main:
                _tell(folder, name, named, problems)
            return folder / name
        problems[name] = problem
    if problems:
        first, reason = next(iter(problems.items()))
        raise UserError(
            f"{folder}: none of its {len(problems)} checkpoints is good; {first}: {reason}. Bring back a good copy, or "
            "start anew with --no_resume, which keeps these folders"
        )
    if named is not None:
        raise UserError(
            f"{folder / LATEST} names {named!r}, but there is no checkpoint at all; bring the folder back, or start "
            "anew with --no_resume, which keeps this folder"
        )
    return None


def put_away(folder: str | Path) -> None:
    """Rename a folder of checkpoints, so that a run can start from the beginning without losing it."""
    folder, number = Path(folder), 1
    if not folder.exists():
        return
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    os.replace(folder, aside)
    log.info("earlier checkpoints are in %s now", aside)


def _candidates(folder: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, oldest first."""
    try:
        found = [each for each in folder.iterdir() if _is_candidate(each)]
    except OSError:
        return []
    return sorted(found, key=step_of)


def _is_candidate(folder: Path) -> bool:
    return step_of(folder) is not None and folder.is_dir() and not folder.is_symlink()


def _named_by_latest(folder: Path) -> str | None:
    """Return the content of `latest`; None if there is no such file."""
    try:
        return (folder / LATEST).read_bytes()[:100].decode(errors="replace").strip()
    except OSError:
        return None


def _order_to_try(folder: Path) -> tuple[str | None, list[str]]:
    """Return the content of `latest`, and the names of the folders to try, the best first.

    A folder that has a checkpoint's name but no file of a checkpoint is not ours, and is not tried.
    """
    named = _named_by_latest(folder)
    candidates = [each.name for each in reversed(_candidates(folder)) if _looks_own(each)]
    return named, sorted(candidates, key=lambda name: name != named)


def _looks_own(folder: Path) -> bool:
    """Return whether a folder contains a file of a checkpoint, or is empty."""
    try:
        return any(os.path.lexists(folder / name) for name in OWN_FILES) or not any(folder.iterdir())
    except OSError:
        return True


def _problem(folder: Path, ranks: Ranks) -> str | None:
    """Return the problem of a checkpoint, the same on every process. Each verifies its share of the files."""
    problem = _first_problem(lambda: _check_content(folder, ranks))
    if problem is None:
        problem = _first_problem(lambda: _check_meaning(folder) if ranks.is_main else None)
    return problem


def _first_problem(check: Callable[[], None]) -> str | None:
    """Return the message of the first process whose check finds damage; None if no process finds any."""
    problem = None
    try:
        check()
    except DamagedCheckpoint as error:
        problem = str(error)
    return next((each for each in gather_values(problem) if each is not None), None)


def _check_content(folder: Path, ranks: Ranks) -> None:
    if (folder / ".metadata").exists() and not (folder / MANIFEST_FILE).exists():
        raise DamagedCheckpoint("an earlier version wrote it, in a format that can run code when it is read")
    manifest = read_manifest(folder)
    if manifest.step != step_of(folder):
        raise DamagedCheckpoint(f"{MANIFEST_FILE} is that of step {manifest.step}")
    verify(folder, manifest, ranks)


def _check_meaning(folder: Path) -> None:
    manifest = read_manifest(folder)
    stored_tensors(folder, manifest)
    if read_state(folder)["step"] != manifest.step:
        raise DamagedCheckpoint(f"{STATE_FILE} is that of another step")


def _tell(folder: Path, good: str, named: str | None, problems: Mapping[str, str]) -> None:
    """Warn once if the run continues from another checkpoint than intended, and rename damaged ones."""
    for name, reason in problems.items():
        set_aside(folder / name, f"is damaged ({reason}), and training goes on from {good}", log)
    if named is not None and named != good and named not in problems:
        log.warning("%s names %r, which is no checkpoint; training goes on from %s", folder / LATEST, named, good)
    elif named is None and not problems:
        log.warning("%s is missing; training goes on from %s", folder / LATEST, good)
    if named != good:
        if os.path.lexists(folder / LATEST) and not is_own_file(folder / LATEST):
            set_aside(folder / LATEST, "is not a file", log)
        atomic_write_text(folder / LATEST, good + "\n")
