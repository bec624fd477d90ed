"""The reports of a run: log lines, a progress bar, metrics.jsonl, and wandb or TensorBoard on request."""

import errno
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from tqdm import tqdm

from utils.errors import UserError
from utils.files import NO_FOLLOW, atomic_write_bytes, atomic_write_text, is_own_file, set_aside
from utils.side_files import read_json_lines, read_limited
from utils.spacing import evenly_spaced
from utils.video.read import read_video

try:
    import resource
except ImportError:  # Windows has no such counters
    resource = None

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def _with_step(record: dict[str, float | None]) -> dict[str, float | None]:
    if record.get("step") is None:
        raise ValueError("step is missing")
    return record


MetricLine = Annotated[dict[str, float | None], AfterValidator(_with_step)]
"""One line of metrics.jsonl."""


class Tracker:
    """Writes the metrics and sample videos of one run. Outside the main process every method does nothing."""

    def __init__(
        self,
        folder: str | Path,
        *,
        wandb: bool = False,
        tensorboard: bool = False,
        config: dict[str, Any],
        is_main: bool = True,
        step: int = 0,
    ):
        """Open `folder`/metrics.jsonl to append to it. Lines after `step` are removed: those steps are repeated.

        A new run (`step` 0) keeps the lines of an earlier one as metrics.jsonl.old1, .old2, ... Damaged lines are set
        aside. wandb shows `config` beside the curves.

        Raises:
            UserError: a backend is not installed, or metrics.jsonl is a link or a folder.
        """
        self._file = self._wandb = self._tensorboard = None
        if not is_main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if wandb:
            self._wandb = _start_wandb(folder, config)
        if tensorboard:
            self._tensorboard = _start_tensorboard(folder, step)
        _drop_after(folder / METRICS_FILE, step)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW
        self._file = os.fdopen(os.open(folder / METRICS_FILE, flags, 0o666), "ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line {"step": step, ...}. A value that is not finite is written as null.

        If a line cannot be written, there is only a warning: a full disk does not end a training.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append((json.dumps({"step": step, **finite}) + "\n").encode())
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)  # no half line
            log.warning("metrics not written to %s: %s", self._file.name, error.strerror)

    def video(self, name: str, path: str | Path, step: int) -> None:
        """Show the mp4 at `path` in the backends. TensorBoard gets 8 frames, because its videos need moviepy."""
        if self._wandb is not None:
            self._wandb.log({name: load_wandb().Video(str(path), format="mp4")}, step=step)
        if self._tensorboard is not None:
            frames = read_video(path)
            self._tensorboard.add_images(name, frames[evenly_spaced(len(frames), 8)], step, dataformats="NHWC")

    def close(self) -> None:
        """Flush and close the file and the backends."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def setup_logging(is_main: bool = True) -> None:
    """Log INFO and above to stderr from the main process, ERROR and above from the others, above any progress bar."""
    handler = _ProgressBarHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, handlers=[handler], force=True)


def progress(
    iterable_or_total: Iterable | int, description: str = "", *, unit: str = "it", is_main: bool = True
) -> tqdm:
    """Make a bar with speed and remaining time. It wraps an iterable, or counts `update()` calls up to a total.

    It is shown only in the main process and on a terminal, so that log files stay clean.
    """
    disable = not is_main or not sys.stderr.isatty()
    options = {"desc": description or None, "unit": unit, "disable": disable, "dynamic_ncols": True}
    if isinstance(iterable_or_total, int):
        return tqdm(total=iterable_or_total, **options)
    return tqdm(iterable_or_total, **options)


def read_metrics(path: str | Path, *, repair: bool) -> list[dict[str, float | None]]:
    """Return the lines of a metrics.jsonl. A value that was not finite is None. One warning counts damaged lines.

    With `repair` damaged lines are moved to metrics.jsonl.damaged. Do not use it for a run that may still write.
    """
    return read_json_lines(path, MetricLine, repair=repair)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes or seconds."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: on a GPU since the last call, on a CPU since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    if resource is None:
        return math.nan
    kibibyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibyte / 2**30


class _ProgressBarHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # stderr is a file on a full disk: continue to work
            self.handleError(record)


def load_wandb() -> ModuleType:
    """Import wandb. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb is not installed: pip install -e '.[wandb]', or switch wandb off") from error
    return wandb


def _start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    wandb = load_wandb()
    id_file = folder / "wandb_id.txt"  # a resumed run continues the same curves
    run_id = read_limited(id_file, 1000).decode(errors="replace").strip() if id_file.exists() else None
    if run_id is not None and not re.fullmatch(r"[\w-]{1,128}", run_id):
        set_aside(id_file, "is not the id of a wandb run; a new run is started", log)
        run_id = None
    run = wandb.init(dir=folder, name=folder.resolve().name, config=config, id=run_id, resume="allow")
    atomic_write_text(id_file, run.id)
    return run


def _start_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard is not installed: pip install -e '.[tensorboard]', or switch tensorboard off"
        ) from error
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def _drop_after(path: Path, step: int) -> None:
    """Keep only the complete lines of steps up to `step`."""
    if os.path.lexists(path) and not is_own_file(path):
        raise UserError(f"{path}: is a link or a folder, so it is not written; move it away")
    records = read_metrics(path, repair=True)
    if not records:
        return
    if step == 0:
        number = 1
        while (aside := path.with_name(f"{path.name}.old{number}")).exists():
            number += 1
        os.replace(path, aside)
        log.info("earlier metrics are in %s now", aside)
        return
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    kept = [line + b"\n" for line, record in zip(lines, records, strict=True) if record["step"] <= step]
    if len(kept) < len(lines):
        atomic_write_bytes(path, b"".join(kept))
