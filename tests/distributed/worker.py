"""One process of the jobs in test_jobs.py: a function there, a program under torchrun.

| what | it |
|---|---|
| train | works until any process of the job gets a signal, then saves |
| wait | waits for another process longer than the job's own limits |
| raise, vanish | process 1 fails with a message, or is killed, while the other one waits |
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from utils import heartbeat
from utils.cli import exit_code
from utils.distributed import Ranks, any_process, barrier, broadcast_value, init_distributed, stop_signals


def errors_file(folder: Path, rank: int) -> Path:
    """Where :func:`run` writes what it would say on stderr."""
    return folder / f"{rank}.errors"


def run(folder: Path, what: str) -> None:
    """Be one process of a job, with stderr in a file; ends the process."""
    with errors_file(folder, int(os.environ["RANK"])).open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    main(folder, what)


def main(folder: Path, what: str) -> None:
    """Be one process of a job; ends the process."""
    heartbeat.GRACE = 1.0
    work = {"train": train, "wait": wait}.get(what, lose)
    sys.exit(exit_code(lambda: work(init_distributed("cpu"), folder, what)))


def train(ranks: Ranks, folder: Path, _: str) -> None:
    with stop_signals() as stop:
        (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        while not any_process(stop.received is not None):
            time.sleep(0.05)
    (folder / f"{ranks.rank}.saved").touch()


def wait(ranks: Ranks, *_: object) -> None:
    group = torch.distributed.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout > timedelta(days=300)
    torch.distributed.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=1))
    time.sleep(2 * ranks.rank)
    assert broadcast_value("here", source=1) == "here"
    time.sleep(2 * (1 - ranks.rank))
    barrier()


def lose(ranks: Ranks, _: Path, what: str) -> None:
    heartbeat.LOST_AFTER = 5 if what == "vanish" else heartbeat.LOST_AFTER
    barrier()
    if ranks.rank == 1:
        time.sleep(0.5)
        if what == "raise":
            raise RuntimeError("out of luck")
        os.kill(os.getpid(), 9)
    time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
