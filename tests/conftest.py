"""One thread a process, an empty home folder; without a CUDA device, tests marked `gpu` are skipped.

Triton kernels are then interpreted.
"""

import atexit
import os
import shutil
import site
import tempfile

# Tests start processes and threads side by side; tiny models on several OpenMP threads each would mostly wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What the user's own runs keep in their home, such as prompt embeddings, must decide no test. Workers share one home.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages installed with `pip install --user` stay importable
    os.environ["HOME"] = tempfile.mkdtemp(prefix="self-forcing-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is first imported, and torch.compile imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
