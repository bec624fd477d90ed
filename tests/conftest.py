"""Settings of all tests: one thread for each process, and an empty home folder.

Without a CUDA device, tests marked `gpu` are skipped, and Triton kernels run in Triton's interpreter.
"""

import atexit
import logging
import os
import shutil
import signal
import site
import tempfile
from collections.abc import Iterator

# Tests run beside each other. With several OpenMP threads each, tiny models would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files in the user's home, such as prompt embeddings, must not influence a test. All workers share one empty home.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages installed with `pip install --user` stay importable
    os.environ["HOME"] = tempfile.mkdtemp(prefix="self-forcing-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is first imported, and torch.compile imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background jobs, and nohup starts programs, with these signals ignored. Tests send them.
for ignored in (number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN):
    signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undo an entry point's changes to logging after each test, also those of a shared fixture."""
    _forget_logging()
    yield
    _forget_logging()


def _forget_logging() -> None:
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
        handler.filters.clear()  # the demo bounds every handler that it finds
