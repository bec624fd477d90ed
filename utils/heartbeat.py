"""A thread in each process of a job that notices when another one fails or disappears.

Once a second, each process increases a number in the job's store and checks the number of the next process, in a ring.
A process that fails writes its message to the store. Then every other process prints that message and ends within
seconds, even inside a collective operation. A process that only waits or works for hours is never ended.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

PERIOD = 1.0
"""Seconds between two beats."""
LOST_AFTER = 60
"""The most own beats without a beat of the watched process. A laptop's sleep does not count, because beats stop."""
GRACE = 5.0
"""Seconds in which a process can end by itself (close a video, flush a log) before it is ended."""
ORPHAN_GRACE = 600.0
"""Seconds in which a process that lost its launcher can finish its step and save."""
FAILURE = "failure"


def connect(timeout: timedelta) -> dist.Store:
    """Open a new connection to the job's store. One connection can serve only one call at a time."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("heartbeat", dist.TCPStore(*address, is_master=False, timeout=timeout))


def publish_failure(rank: int, error: BaseException) -> str | None:
    """Tell the other processes why this one ends. The first message counts.

    Returns:
        what another process said first, or None.
    """
    text = f"{rank} {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    try:
        first = connect(timedelta(seconds=GRACE)).compare_set(FAILURE, "", text).decode()
    except RuntimeError:  # the store has ended, so the others have too
        return None
    return None if first == text else failure_message(first)


def failure_message(published: str) -> str:
    """Return the message about the process that published a failure."""
    rank, _, message = published.partition(" ")
    return f"process {rank} failed: {message}"


def stop_heartbeat() -> None:
    """Stop the heartbeat of this process, if there is one."""
    for thread in threading.enumerate():
        if isinstance(thread, Heartbeat):
            thread.stop()


class Heartbeat(threading.Thread):
    """Runs until the process leaves its process group."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """`store` comes from :func:`connect`."""
        super().__init__(name="heartbeat", daemon=True)
        self.store = store
        self.rank = rank
        self.watched = (rank + 1) % world_size
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._last, self._missed = 0, 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the thread. Nobody uses its connection to the store after that."""
        self._stopped.set()
        self.join(GRACE)

    def run(self) -> None:
        while dist.is_initialized() and not self._stopped.is_set():
            if self.launcher not in (None, os.getppid()):
                self._end("torchrun has ended", ORPHAN_GRACE)
            try:
                problem = self._beat()
            except RuntimeError:  # the store does not answer
                time.sleep(GRACE)
                if self.launcher not in (None, os.getppid()):
                    continue
                problem = "the process that holds the job together (rank 0, or torchrun) has disappeared"
            if problem and dist.is_initialized():
                self._end(problem, GRACE)
            self._stopped.wait(PERIOD)

    def _beat(self) -> str | None:
        """Increase the own number and check the others. Returns the problem, or None."""
        self.store.add(f"of/{self.rank}", 1)
        if self.store.check([FAILURE]):
            published = self.store.get(FAILURE).decode()
            return failure_message(published) if int(published.partition(" ")[0]) != self.rank else None
        beats = self.store.add(f"of/{self.watched}", 0)
        self._missed = 0 if beats != self._last else self._missed + 1
        self._last = beats
        if self._missed >= LOST_AFTER:
            return f"process {self.watched} has given no sign of life for {self._missed * PERIOD:.0f} seconds"
        return None

    def _end(self, reason: str, grace: float) -> None:
        """Ask this process to end, and end it if it does not do so in time."""
        sys.stderr.write(f"error: {reason}; process {self.rank} ends too\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + grace
        while time.monotonic() < until:
            time.sleep(0.1)
            if not dist.is_initialized():
                return
        os._exit(1)
