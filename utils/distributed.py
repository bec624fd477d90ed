"""Processes, devices and seeds. Everything works in a single process too, without a process group.

Started by torchrun, each process learns its place from the environment when `init_distributed` is called, not before.
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils.errors import UserError

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all of them."""

    rank: int = 0  # among all processes
    world_size: int = 1  # number of processes
    local_rank: int = 0  # among the processes of this machine: the index of its GPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, samples and shared files."""
        return self.rank == 0


def init_distributed(device: str, *, timeout: timedelta = timedelta(minutes=30)) -> Ranks:
    """Join torchrun's process group (gloo on "cpu", nccl and gloo on "cuda") and claim this process's GPU.

    Without torchrun, or with one process, it makes no group. `timeout` is how long a process waits for the others.
    Raises UserError for a device that several processes cannot use or an incomplete environment.
    """
    world_size = _environment_int("WORLD_SIZE", default=1)
    if world_size == 1:
        return Ranks()
    ranks = Ranks(rank=_environment_int("RANK"), world_size=world_size, local_rank=_environment_int("LOCAL_RANK"))
    if device == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={ranks.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "lower --nproc_per_node"
            )
        torch.cuda.set_device(ranks.local_rank)
    elif device != "cpu":
        raise UserError(f"device {device!r} cannot run {world_size} processes: use cpu or cuda")
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=timeout)
    return ranks


def device_mesh(device: torch.device, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """All processes as a mesh of `shape`; one process without a group gets one for itself."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device.type), store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The `value` of process `source`, in every process; anything that pickles."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean of `values` over the processes, as a new tensor of the same shape, dtype and device."""
    mean = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)  # a sum: gloo has no mean
        mean /= dist.get_world_size()
    return mean


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process, in every process."""
    votes = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, with which schedulers announce the end, while it is entered."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # not on Windows

    def __init__(self) -> None:
        self._received = False
        self._handlers: dict[int, Any] = {}

    def made(self) -> bool:
        """Whether any process was signalled; all processes ask together and get the same answer."""
        return any_process(self._received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # where alone Python allows handlers
            self._handlers = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The items of process `rank`, dealt like cards: over all ranks every item comes exactly once."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
    return items[rank::world_size]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part, its type and its place: `derive_seed(seed, prompt, "noise")`."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else CPU. Raises UserError if unknown or not available."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    choices = f"choose auto, {' or '.join(available)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: {choices}") from error
    if device.type not in available:
        raise UserError(f"device {name!r} is not available on this machine: {choices}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    return device


def share_cores(device: torch.device, ways: int = 2) -> None:
    """Let each of `ways` threads that compute side by side use its share of the cores, where they compute on a CPU.

    Else each would use all of them and, small models above all, wait for the others far longer than compute.
    OMP_NUM_THREADS, where set, decides.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ways))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on CUDA and float32 elsewhere. Raises UserError if unknown."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _backend(device: str) -> str:
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def _environment_int(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"environment variable {name}={value!r} is not a number: start with torchrun") from error
