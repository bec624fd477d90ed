"""Real jobs of two processes: a signal ends both in order, waiting has no time limit, a lost process ends the other."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from scripts.endurance.kills import start_ranks, wait
from tests.distributed import terminal, worker


def wait_for(condition, timeout: float = 100.0) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_without_launcher(folder: Path, what: str) -> list[BaseProcess]:
    """Two processes as a Slurm script starts them: nobody watches over them."""
    return start_ranks(worker.run, (folder, what), 2)


@pytest.mark.parametrize(
    ("whom", "number"),
    [("torchrun", signal.SIGTERM), ("the terminal", signal.SIGINT), ("torchrun", signal.SIGKILL)],
    ids=["SIGTERM to torchrun", "Ctrl-C in the terminal", "SIGKILL to torchrun"],
)
def test_whoever_gets_the_signal_all_processes_save_and_none_stays(tmp_path, whom, number):
    (job,) = start_ranks(terminal.run, (tmp_path, "train"), 1)
    try:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        if whom == "the terminal":
            os.killpg(job.pid, number)
        else:
            os.kill(job.pid, number)
        wait_for(lambda: not any(map(is_alive, pids)), timeout=30)
        job.join(30)
        assert not job.is_alive()
    finally:
        job.kill()
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_a_process_waits_for_another_that_works_longer_than_any_limit(tmp_path):
    wait(start_without_launcher(tmp_path, "wait"), timeout=100)
    assert [worker.errors_file(tmp_path, rank).read_text() for rank in range(2)] == ["", ""]


@pytest.mark.parametrize(
    ("what", "message"),
    [("raise", "process 1 failed: RuntimeError: out of luck"), ("vanish", "process 1 has given no sign of life")],
)
def test_a_process_that_fails_or_vanishes_ends_the_other_within_seconds(tmp_path, what, message):
    first, second = start_without_launcher(tmp_path, what)
    second.join(100)
    ended = time.monotonic()
    first.join(100)
    assert time.monotonic() - ended < 20 and first.exitcode not in (0, None)
    assert message in worker.errors_file(tmp_path, 0).read_text()
