"""Real jobs of two processes: a signal ends both in order, waiting has no time limit, a lost process ends the other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from utils import heartbeat
from utils.cli import exit_code
from utils.distributed import any_process, barrier, broadcast_value, init_distributed, stop_signals

heartbeat.GRACE = 1.0
folder, what = Path(sys.argv[1]), sys.argv[2]

def work():
    ranks = init_distributed("cpu")
    if what == "train":
        with stop_signals() as stop:
            (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
            while not any_process(stop.received is not None):
                time.sleep(0.05)
        (folder / f"{ranks.rank}.saved").touch()
    elif what == "wait":
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout > timedelta(days=300)
        torch.distributed.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=1))
        time.sleep(2 * ranks.rank)
        assert broadcast_value("here", source=1) == "here"
        time.sleep(2 * (1 - ranks.rank))
        barrier()
    else:
        heartbeat.LOST_AFTER = 5 if what == "vanish" else heartbeat.LOST_AFTER
        barrier()
        if ranks.rank == 1:
            time.sleep(0.5)
            if what == "raise":
                raise RuntimeError("out of luck")
            os.kill(os.getpid(), 9)
        time.sleep(60)

sys.exit(exit_code(work))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def worker(tmp_path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    return [str(tmp_path / "worker.py"), str(tmp_path)]


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


def start_without_launcher(worker: list[str], what: str) -> list[subprocess.Popen]:
    """Start two processes as a Slurm script does, without a launcher that watches them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *worker, what],
            env=ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("whom", "number"),
    [("torchrun", signal.SIGTERM), ("the terminal", signal.SIGINT), ("torchrun", signal.SIGKILL)],
    ids=["SIGTERM to torchrun", "Ctrl-C in the terminal", "SIGKILL to torchrun"],
)
def test_whoever_gets_the_signal_all_processes_save_and_none_stays(worker, tmp_path, whom, number):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen(
        [*torchrun, *worker, "train"],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    if whom == "the terminal":
        os.killpg(job.pid, number)
    else:
        os.kill(job.pid, number)
    wait_for(lambda: not any(map(is_alive, pids)), timeout=30)
    job.wait(30)
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_a_process_waits_for_another_that_works_longer_than_any_limit(worker):
    group = start_without_launcher(worker, "wait")
    assert [process.communicate(timeout=100)[1] for process in group] == ["", ""]
    assert [process.returncode for process in group] == [0, 0]


@pytest.mark.parametrize(
    ("what", "message"),
    [("raise", "process 1 failed: RuntimeError: out of luck"), ("vanish", "process 1 has given no sign of life")],
)
def test_a_process_that_fails_or_vanishes_ends_the_other_within_seconds(worker, what, message):
    first, second = start_without_launcher(worker, what)
    second.communicate(timeout=100)
    ended = time.monotonic()
    errors = first.communicate(timeout=100)[1]
    assert time.monotonic() - ended < 20 and first.returncode != 0
    assert message in errors
