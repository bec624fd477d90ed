"""One thread a process, and tests marked `gpu` skipped on machines without a CUDA device."""

import os

# Tests start processes and threads side by side; tiny models on several OpenMP threads each would mostly wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
