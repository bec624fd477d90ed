"""Named stateful objects <-> a checkpoint folder, over torch.distributed.checkpoint.

`checkpoints/step_00000200/` holds the tensors, sharded as the processes held them, and `state.json` with everything
else. The folder is written beside its place and renamed, so it is whole or not there; the file `latest`, which names
the one to resume from, moves last. A checkpoint can be read by any number of processes.
"""

import json
import logging
import os
import pickle
import platform
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from utils.distributed import broadcast_object
from utils.errors import UserError
from utils.files import atomic_write_text

log = logging.getLogger(__name__)

LATEST = "latest"
STATE_FILE = "state.json"
METADATA_FILE = ".metadata"


class Stateful(Protocol):
    """What can be saved. A state is flat: tensors, sharded or the same on every process, and values JSON can hold."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state now."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go on from a state that :meth:`state_dict` gave."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A stateful object whose tensors come into being as it works, so that it may hold fewer than were saved."""

    def room_for(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors to read saved ones into; `saved` describes those on the meta device."""
        ...


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay."""

    last: int
    """How many of the newest."""
    every: int = 0
    """Besides, those of steps that are multiples of this; 0 is none."""


class Checkpoints:
    """The checkpoints of a run, in one folder."""

    def __init__(self, folder: str | Path, keep: KeepPolicy, *, background: bool = False, is_main: bool = True) -> None:
        """`background` writes in a thread while training goes on, after a copy to CPU memory."""
        self.folder = Path(folder)
        self.keep = keep
        self.background = background
        self.is_main = is_main
        self._group = dist.new_group(backend="gloo") if background and dist.is_initialized() else None
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, objects: Mapping[str, Stateful], about: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; where that fails, say so and leave the others alone. All processes call it.

        Args:
            objects: by names that stay the same from run to run.
            about: more for `state.json`: what :func:`load_checkpoint` returns.
        """
        self.finish()
        tensors, values = _collect(objects)
        problem = broadcast_object(self._begin(step, {**about, "values": values}) if self.is_main else None)
        if problem is not None:
            self._report_failure(step, problem)
            return
        writer = dcp.FileSystemWriter(self._unfinished(step))
        try:
            _expect_one_process()
            if self.background:
                self._pending = step, dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
            else:
                dcp.save(tensors, storage_writer=writer)
        except (Exception, CheckpointException) as error:
            self._report_failure(step, _reason(error))
        else:
            if not self.background:
                self._commit(step)

    def finish(self, *, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if it is there yet or to `wait` for it."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            self._report_failure(step, _reason(error))
        else:
            self._commit(step)

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.unfinished"

    def _begin(self, step: int, state: Mapping[str, Any]) -> str | None:
        """Make the unfinished folder with its `state.json`; returns what is wrong."""
        try:
            for left in self.folder.glob(".step_*.unfinished"):  # by a run that was killed
                shutil.rmtree(left)
            unfinished = self._unfinished(step)
            unfinished.mkdir(parents=True)
            text = json.dumps({"step": step, "versions": _versions(), **state}, indent=1)
            atomic_write_text(unfinished / STATE_FILE, text + "\n")
        except OSError as error:
            return _reason(error)
        return None

    def _commit(self, step: int) -> None:
        if not self.is_main:
            return
        place = self._place(step)
        try:
            if place.exists():  # renamed, but `latest` never told so
                shutil.rmtree(place)
            os.replace(self._unfinished(step), place)
            atomic_write_text(self.folder / LATEST, place.name + "\n")
        except OSError as error:
            self._report_failure(step, _reason(error))
            return
        self._prune()

    def _prune(self) -> None:
        finished = sorted(self.folder.glob("step_*"))
        for folder in finished[: -self.keep.last]:
            if not self.keep.every or _step_of(folder) % self.keep.every:
                shutil.rmtree(folder, ignore_errors=True)

    def _report_failure(self, step: int, reason: str) -> None:
        if not self.is_main:
            return
        shutil.rmtree(self._unfinished(step), ignore_errors=True)
        good = latest_checkpoint(self.folder)
        log.warning(
            "checkpoint of step %d not written to %s: %s; training goes on, and %s",
            step,
            self.folder,
            reason,
            "there is no earlier one" if good is None else f"{good.name} is still good",
        )


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that `latest` names, or else the newest whole one; None where there is none."""
    folder = Path(folder)
    named = [folder / (folder / LATEST).read_text().strip()] if (folder / LATEST).is_file() else []
    candidates = named + sorted(folder.glob("step_*"), reverse=True)
    return next((place for place in candidates if _is_whole(place)), None)


def set_aside(folder: str | Path) -> None:
    """Rename a folder of checkpoints, so that a run starts anew without losing what is there."""
    folder, number = Path(folder), 1
    if not folder.exists():
        return
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    os.replace(folder, aside)
    log.info("earlier checkpoints are in %s now", aside)


def read_about(folder: str | Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint holds: "step", "versions", "values" and what the caller added.

    Raises:
        UserError: it is missing or damaged.
    """
    path = Path(folder) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a readable checkpoint ({error}); remove {folder} to go on without") from None


def load_checkpoint(folder: str | Path, objects: Mapping[str, Stateful]) -> dict[str, Any]:
    """Restore objects from a checkpoint, whatever the number of processes that wrote it. All processes call it.

    Returns:
        what :func:`read_about` returns.

    Raises:
        UserError: the checkpoint is of other objects, or of other sizes, or damaged.
    """
    about = read_about(folder)
    saved = _describe(folder)
    room: dict[str, Tensor] = {}
    for name, item in objects.items():
        if isinstance(item, Growing):
            tensors = item.room_for(_under(name, saved))
        else:
            tensors = {key: value for key, value in item.state_dict().items() if isinstance(value, Tensor)}
        room |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    _check_fit(folder, saved, room)
    _read(folder, room)
    for name, item in objects.items():
        item.load_state_dict(_under(name, room) | about["values"].get(name, {}))
    return about


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, as `<object>/<key>`."""
    tensors = {key: torch.empty_like(described, device="cpu") for key, described in _describe(folder).items()}
    _read(folder, tensors)
    return tensors


def _describe(folder: str | Path) -> dict[str, Tensor]:
    """What a checkpoint holds, as tensors on the meta device."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise _unreadable(folder, error) from error
    return {
        key: torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
        for key, stored in metadata.state_dict_metadata.items()
    }


def _read(folder: str | Path, room: dict[str, Tensor]) -> None:
    try:
        _expect_one_process()
        dcp.load(room, storage_reader=dcp.FileSystemReader(folder))
    except (Exception, CheckpointException) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str | Path, error: BaseException) -> UserError:
    return UserError(f"{folder}: cannot be read ({_reason(error)}); remove it to go on from an older one")


def _collect(objects: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """All tensors as `<object>/<key>`, and the other values of each object."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, item in objects.items():
        for key, value in item.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach()
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


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


def _is_whole(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file() and (folder / STATE_FILE).is_file()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def _reason(error: BaseException) -> str:
    """The cause in a few words: what the system said, if it was the system."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _expect_one_process() -> None:
    """A single process without a group is no mistake."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
