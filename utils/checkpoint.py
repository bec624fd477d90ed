"""Checkpoints of a run: save named objects, and restore them.

`checkpoints/step_00000200/` is first written as `.step_00000200.unfinished`, flushed to the disk and renamed. Only then
is its name written into the file `latest`. Older checkpoints are removed last. So a power cut at any moment costs at
most the steps since the last checkpoint. The format is in `utils.checkpoint_files`; `utils.checkpoint_search` finds the
checkpoint from which a run continues.
"""

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from utils.checkpoint_files import (
    STATE_FILE,
    Checksum,
    DamagedCheckpoint,
    Manifest,
    Rows,
    StoredTensor,
    read_manifest,
    read_state,
    read_tensors_into,
    rows_of,
    stored_tensors,
    tensor_file,
    write_file,
    write_manifest,
    write_tensors,
)
from utils.checkpoint_search import ALONE, LATEST, checkpoint_name, is_own, own_checkpoints, step_of
from utils.distributed import Ranks, all_processes, broadcast_value, gather_values
from utils.errors import UserError
from utils.files import atomic_write_text, fsync_folder, set_aside

log = logging.getLogger(__name__)

UNFINISHED = re.compile(r"\.step_\d{8,}\.unfinished")


class Stateful(Protocol):
    """An object that can be saved. Its state is flat: tensors (sharded, or equal on every process) and JSON values."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the present state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Restore a state that :meth:`state_dict` returned."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A stateful object that makes its tensors while it works. It may have fewer tensors than were saved."""

    def room_for(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors into which saved ones are read. `saved` describes the saved ones on the meta device."""
        ...


@dataclass(frozen=True)
class KeepPolicy:
    """The checkpoints to keep."""

    last: int
    """The number of newest checkpoints to keep."""
    every: int = 0
    """Keep also the checkpoints of steps that are multiples of this. 0 keeps none of them."""


@dataclass
class _Writing:
    """A checkpoint that is being written."""

    step: int
    state: Checksum | None
    """Checksum of `state.json`; None outside the main process."""
    tensors: Future[Checksum]
    """Checksum of this process's tensors."""


class Checkpoints:
    """Writes the checkpoints of a run into one folder, and removes old ones."""

    def __init__(self, folder: str | Path, keep: KeepPolicy, *, background: bool = False, ranks: Ranks = ALONE) -> None:
        """`background` writes in a thread while training goes on, from a copy in CPU memory."""
        self.folder = Path(folder)
        self.keep = keep
        self.background = background
        self.ranks = ranks
        self._writing: _Writing | None = None

    def save(self, step: int, objects: Mapping[str, Stateful], about: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step. All processes call it.

        If it cannot be written, one warning says so, and the earlier checkpoints stay.

        Args:
            step: number of the step.
            objects: the objects, by names that do not change from run to run.
            about: more entries for `state.json`. :func:`load_checkpoint` returns them.
        """
        self.finish()
        tensors, values = _collect(objects, self.ranks.rank)
        state, problem = self._begin(step, {**about, "values": values}) if self.ranks.is_main else (None, None)
        problem = broadcast_value(problem)
        if problem is not None:
            self._report_failure(step, problem)
            return
        path = self._unfinished(step) / tensor_file(self.ranks.rank)
        if self.background:
            copied = {name: _copied(rows) for name, rows in tensors.items()}
            worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._writing = _Writing(step, state, worker.submit(write_tensors, path, copied))
            worker.shutdown(wait=False)
            return
        self._writing = _Writing(step, state, Future())
        try:
            self._writing.tensors.set_result(write_tensors(path, tensors))
        except OSError as error:
            self._writing.tensors.set_exception(error)
        self.finish()

    def finish(self, *, wait: bool = True) -> None:
        """Rename the checkpoint that is being written to its final name, if it is complete. `wait` waits for that."""
        if self._writing is None or not (wait or all_processes(self._writing.tensors.done())):
            return
        writing, self._writing = self._writing, None
        try:
            written = vars(writing.tensors.result())
        except OSError as error:
            written = {"problem": _reason(error)}
        gathered = gather_values(written)
        if not self.ranks.is_main:
            return
        problems = [each["problem"] for each in gathered if "problem" in each]
        if problems:
            self._report_failure(writing.step, problems[0])
            return
        files = {tensor_file(rank): Checksum(**each) for rank, each in enumerate(gathered)}
        try:
            self._commit(writing.step, {STATE_FILE: writing.state, **files})
        except OSError as error:
            self._report_failure(writing.step, _reason(error))

    def _place(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".{checkpoint_name(step)}.unfinished"

    def _begin(self, step: int, state: Mapping[str, Any]) -> tuple[Checksum | None, str | None]:
        """Make the unfinished folder with its `state.json`. Returns the file's checksum, or the problem in words."""
        try:
            if self.folder.is_dir():
                for left in self.folder.iterdir():  # by a run that was killed
                    if UNFINISHED.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left)
            unfinished = self._unfinished(step)
            unfinished.mkdir(parents=True)
            text = json.dumps({"step": step, "versions": _versions(), **state}, indent=1) + "\n"
            return write_file(unfinished / STATE_FILE, [text.encode()]), None
        except OSError as error:
            return None, _reason(error)

    def _commit(self, step: int, files: Mapping[str, Checksum]) -> None:
        """Flush everything before `latest` names it, and flush `latest` before older checkpoints are removed."""
        place, unfinished = self._place(step), self._unfinished(step)
        write_manifest(unfinished, Manifest(step, dict(files)))
        fsync_folder(unfinished)
        if os.path.lexists(place):
            if is_own(place):  # from before the run went back to an earlier checkpoint
                shutil.rmtree(place)
            else:
                set_aside(place, f"is in the way of the checkpoint of step {step}", log)
        os.replace(unfinished, place)
        fsync_folder(self.folder)
        atomic_write_text(self.folder / LATEST, place.name + "\n")
        self._prune()

    def _prune(self) -> None:
        for folder in own_checkpoints(self.folder)[: -self.keep.last]:
            if not self.keep.every or step_of(folder) % self.keep.every:
                shutil.rmtree(folder, ignore_errors=True)

    def _report_failure(self, step: int, reason: str) -> None:
        if not self.ranks.is_main:
            return
        shutil.rmtree(self._unfinished(step), ignore_errors=True)
        good = own_checkpoints(self.folder)
        log.warning(
            "the checkpoint of step %d could not be written to %s: %s; training goes on, and %s",
            step,
            self.folder,
            reason,
            f"{good[-1].name} is still good" if good else "there is no earlier one",
        )


def read_about(folder: str | Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint: "step", "versions", "values" and the entries of the caller.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return read_state(Path(folder))
    except DamagedCheckpoint as error:
        raise _unreadable(folder, error) from None


def load_checkpoint(folder: str | Path, objects: Mapping[str, Stateful], ranks: Ranks = ALONE) -> dict[str, Any]:
    """Restore objects from a checkpoint that any number of processes wrote. All processes call it.

    The files should be verified before: :func:`utils.checkpoint_search.find_good_checkpoint` does it.

    Returns:
        what :func:`read_about` returns.

    Raises:
        UserError: the checkpoint contains other objects or sizes, or is damaged.
    """
    about = read_about(folder)
    stored = _describe(folder)
    saved = _on_meta(stored)
    room: dict[str, Tensor] = {}
    for name, item in objects.items():
        if isinstance(item, Growing):
            tensors = item.room_for(_under(name, saved))
        else:
            tensors = {key: value for key, value in item.state_dict().items() if isinstance(value, Tensor)}
        room |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    _check_fit(folder, saved, room)
    _read(folder, stored, room, ranks.rank)
    for name, item in objects.items():
        try:
            item.load_state_dict(_under(name, room) | about["values"].get(name, {}))
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(
                f"{folder}: does not fit this run: the values of {name} are not what it saves "
                f"({reason}); use the configuration it was made with, or another --logdir"
            ) from error
    return about


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, whole, as `<object>/<key>`."""
    stored = _describe(folder)
    tensors = {key: torch.empty_like(described, device="cpu") for key, described in _on_meta(stored).items()}
    _read(folder, stored, tensors, rank=0)
    return tensors


def _describe(folder: str | Path) -> dict[str, StoredTensor]:
    try:
        return stored_tensors(Path(folder), read_manifest(Path(folder)))
    except DamagedCheckpoint as error:
        raise _unreadable(folder, error) from None


def _on_meta(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return stored tensors without their content."""
    return {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in stored.items()}


def _read(folder: str | Path, stored: Mapping[str, StoredTensor], room: Mapping[str, Tensor], rank: int) -> None:
    try:
        read_tensors_into(Path(folder), stored, {name: rows_of(tensor, rank) for name, tensor in room.items()})
    except DamagedCheckpoint as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: str | Path, error: Exception) -> UserError:
    return UserError(f"{folder}: cannot be read: {error}; start again to go on from an older checkpoint")


def _collect(objects: Mapping[str, Stateful], rank: int) -> tuple[dict[str, Rows], dict[str, dict[str, Any]]]:
    """Return the tensors that this process writes, as `<object>/<key>`, and the other values of each object."""
    tensors: dict[str, Rows] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, item in objects.items():
        for key, value in item.state_dict().items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            elif not (rows := rows_of(value, rank)).is_copy:
                tensors[f"{name}/{key}"] = rows
    return tensors, values


def _copied(rows: Rows) -> Rows:
    return Rows(rows.local.to("cpu", copy=True), rows.start, rows.shape, rows.is_copy)


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _check_fit(folder: str | Path, saved: Mapping[str, Tensor], room: Mapping[str, Tensor]) -> None:
    for key in sorted({*saved, *room}):
        there, here = (tuple(state[key].shape) if key in state else "missing" for state in (saved, room))
        if there != here:
            raise UserError(
                f"{folder}: does not fit this run: {key} (checkpoint: {there}, run: {here}); "
                "use the configuration it was made with, or another --logdir"
            )


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
