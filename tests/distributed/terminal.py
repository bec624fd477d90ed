"""torchrun for test_jobs.py, in a process that has already imported torch."""

import os
import sys
from pathlib import Path

from torch.distributed import run as torchrun

from tests.distributed import worker


def run(folder: Path, what: str) -> None:
    """Be torchrun with two processes of worker.py, in a session of its own, as in a terminal."""
    os.setsid()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    torchrun.main(["--standalone", "--nproc_per_node=2", worker.__file__, str(folder), what])
