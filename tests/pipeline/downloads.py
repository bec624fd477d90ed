"""Downloads of test_download.py, each in a process of its own. They are forks of one that has imported torch.

The parent reads one JSON line for each download and prints two: the id of the process, and its exit status. The hub's
client reads its settings when it is imported, so only the forks import it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import PipelineConfig
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Download:
    """A download that runs."""

    parent: subprocess.Popen
    log: Path
    pid: int

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for its end. Return its exit status, negative for a signal, and what it said."""
        status = int(self.parent.stdout.readline())
        return subprocess.CompletedProcess("download", status, stderr=self.log.read_text())


def start_parent() -> subprocess.Popen:
    """Start the process from which downloads are forked."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.downloads"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def start(parent: subprocess.Popen, folder: Path, environment: dict[str, str]) -> Download:
    """Start to download the weights of Wan2.1-T2V-1.3B below a folder."""
    log = folder / "download.log"
    parent.stdin.write(json.dumps([str(folder), str(log), environment]) + "\n")
    return Download(parent, log, int(parent.stdout.readline()))


def serve() -> None:
    """Be the parent."""
    for line in sys.stdin:
        folder, log, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a download that hangs ends
            os.environ |= environment
            os.chdir(folder)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(file, number)
            return download()
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def download() -> None:
    """Download, as the programs do. A UserError ends the process with one line."""
    from pipeline.download import download_weights  # it imports the hub's client

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = PipelineConfig()
    config.generator.weights = "wan_models/Wan2.1-T2V-1.3B"
    try:
        download_weights(config)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    serve()
