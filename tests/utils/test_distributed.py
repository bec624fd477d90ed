"""Processes agree on values and divide work completely. Devices and seeds are the requested ones."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from scripts.endurance.kills import start_ranks, wait
from utils.distributed import (
    Ranks,
    all_processes,
    all_reduce_mean,
    any_process,
    barrier,
    broadcast_value,
    device_mesh,
    gather_values,
    init_distributed,
    processes_here,
    resolve_device,
    resolve_dtype,
    share,
    share_cores,
    shutdown_distributed,
    stop_signals,
)
from utils.errors import UserError
from utils.seeds import derive_seed

ROOT = Path(__file__).parents[2]
PLACE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
HOST = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

MESHES = [((2,), ("shard",)), ((2, 1), ("replicate", "shard"))]


def work(folder: Path) -> None:
    """In each of two processes: note what they tell each other."""
    ranks = init_distributed("cpu")
    if ranks.rank == 1:
        (folder / "before").write_text("")
    barrier()
    values = torch.tensor([float(ranks.rank), 10.0])
    result = {
        "ranks": [ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main],
        "seen": (folder / "before").exists(),
        "object": broadcast_value({"from": ranks.rank}, source=1),
        "gathered": gather_values([None, "日" * 100] if ranks.rank else {}),
        "mean": all_reduce_mean(values).tolist(),
        "unchanged": values.tolist(),
        "share": share(list(range(5)), ranks.rank, ranks.world_size),
        "any": [any_process(ranks.rank == 1), any_process(False)],
        "all": [all_processes(ranks.rank == 1), all_processes(True)],
        "mesh": [list(device_mesh(torch.device("cpu"), shape, names).shape) for shape, names in MESHES],
    }
    with stop_signals() as stop:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        result["stop"] = any_process(stop.received is not None)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(result))
    shutdown_distributed()


def test_two_processes_agree(tmp_path):
    wait(start_ranks(work, (tmp_path,), 2), timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["ranks"] == [0, 2, 0, True] and second["ranks"] == [1, 2, 1, False]
    assert first["seen"] and second["seen"]
    assert first["object"] == second["object"] == {"from": 1}
    assert first["mean"] == second["mean"] == [0.5, 10.0]
    assert first["unchanged"] == [0.0, 10.0] and second["unchanged"] == [1.0, 10.0]
    assert first["share"] == [0, 2, 4] and second["share"] == [1, 3]
    assert first["gathered"] == second["gathered"] == [{}, [None, "日" * 100]]
    assert first["any"] == second["any"] == [True, False]
    assert first["all"] == second["all"] == [False, True]
    assert first["mesh"] == second["mesh"] == [[2], [2, 1]]
    assert first["stop"] and second["stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_training_remembers_the_signals_that_end_it(number):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_but_a_launchers_repetition_does_not(monkeypatch):
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_distributed("cpu") == Ranks(rank=0, world_size=1, local_rank=0)
    assert not torch.distributed.is_initialized()
    barrier()
    value, tensor = {"a": [1]}, torch.ones(2)
    assert any_process(True) and not any_process(False)
    assert broadcast_value(value) is value and gather_values(value) == [value]
    mean = all_reduce_mean(tensor)
    assert torch.equal(mean, tensor) and mean is not tensor
    shutdown_distributed()


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"WORLD_SIZE": "2"}, "cpu", "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "0"}, "cpu", "RANK is set, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": "0"}, "cpu", "LOCAL_RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "cpu", "WORLD_SIZE, RANK are set, but LOCAL_RANK is not"),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE='two' is not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "cpu", r"a rank lies in \[0, WORLD_SIZE\)"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, "cpu", r"a rank lies in \[0, WORLD_SIZE\)"),
        (PLACE, "cpu", "are set, but MASTER_ADDR is not: start with torchrun"),
        ({**PLACE, "MASTER_ADDR": "localhost"}, "cpu", "are set, but MASTER_PORT is not: start with torchrun"),
        ({**PLACE, "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "cpu", "MASTER_PORT='x' is not a whole number"),
        ({**PLACE, "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "cpu", "MASTER_PORT=70000 is not a port"),
        ({**PLACE, **HOST}, "mps", "device 'mps' cannot run 2 processes"),
        ({**HOST, "WORLD_SIZE": "99", "RANK": "98", "LOCAL_RANK": "98"}, "cuda", "LOCAL_RANK=98 has no GPU"),
    ],
)
def test_a_wrong_environment_is_refused(monkeypatch, environment, device, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        init_distributed(device)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_item_is_dealt_exactly_once(world_size):
    items = [f"prompt {i}" for i in range(5)]
    dealt = [item for rank in range(world_size) for item in share(items, rank, world_size)]
    assert sorted(dealt) == items
    with pytest.raises(ValueError, match="rank=3"):
        share(items, 3, 3)


def test_seeds_depend_on_every_part_and_are_the_same_everywhere():
    assert derive_seed(0, "a prompt", "noise") == derive_seed(0, "a prompt", "noise") == 1878642147466271674
    parts = [(1,), ("1",), (1, 2), (12,), (2, 1), ("1", "2"), ("12",), ("1,2",), ("a", ""), ("", "a"), ("a",), ()]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))
    torch.Generator().manual_seed(max(derive_seed(i) for i in range(100)))


def test_devices_are_found_or_refused(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    for name, message in [("gpu", "unknown device 'gpu': choose auto, cpu"), ("cuda:1", "'cuda:1' is not available")]:
        with pytest.raises(UserError, match=message):
            resolve_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda"
    with pytest.raises(UserError, match="'cuda:1' does not exist: this machine has 1 GPUs"):
        resolve_device("cuda:1")


def test_a_gpu_named_by_its_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda").index is None and resolve_device("cpu").type == "cpu" and current == []
    assert current == [] and resolve_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("value", "processes"), [("4", 4), (None, 16), ("", 16), ("many", 16)])
def test_memory_is_shared_by_the_processes_of_this_machine(monkeypatch, value, processes):
    """With 16 processes on 4 machines, each process has a quarter of its machine's RAM, not a sixteenth."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert processes_here(Ranks(3, 16, 3)) == processes


def test_dtypes_are_found_or_refused():
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(UserError, match="unknown dtype 'half': choose auto, float32"):
        resolve_dtype("half", torch.device("cpu"))


@pytest.mark.parametrize(("variable", "threads"), [(None, max(1, (os.cpu_count() or 1) // 2)), ("7", 3)])
def test_two_computing_threads_share_the_cores_unless_told(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    try:
        torch.set_num_threads(3)
        share_cores(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
