"""Processes, devices and seeds. Everything works in a single process too, without a process group.

Under torchrun, each process reads its rank from the environment when `init_distributed` is called, not before.

Waiting has no time limit while the other processes live: a rank may make samples, export or write videos for hours
while the others wait. A job ends if a rank fails or disappears. `utils.heartbeat` notices this within seconds.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils.errors import UserError
from utils.heartbeat import GRACE, Heartbeat, connect, publish_failure, stop_heartbeat
from utils.signals import StopSignals

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RENDEZVOUS = timedelta(minutes=30)
"""The time limit for the processes of a job to find each other."""
UNLIMITED = timedelta(days=365)
"""The time limit of a collective operation. It is very long, because the heartbeat ends a job that hangs."""
LOST_CONNECTION = ("by peer", "Broken pipe", "remote process exited")
"""Parts of what gloo and NCCL say of a process that has ended."""
BARRIER_POLL = 0.2
"""Seconds."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all of them."""

    rank: int = 0  # among all processes
    world_size: int = 1  # number of processes
    local_rank: int = 0  # among the processes of this machine: the index of its GPU

    @property
    def is_main(self) -> bool:
        """True if this process writes logs, samples and shared files."""
        return self.rank == 0


def init_distributed(device: str) -> Ranks:
    """Join the job's process group (gloo on "cpu", nccl and gloo on "cuda") and claim this process's GPU.

    Without torchrun, or with one process, it makes no group. :func:`utils.cli.exit_code` leaves the group at the end.

    Raises:
        UserError: the device cannot be used by several processes, or the environment is incomplete.
    """
    ranks = _ranks_from_environment()
    if ranks.world_size == 1:
        return ranks
    if device == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={ranks.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "lower --nproc_per_node"
            )
        torch.cuda.set_device(ranks.local_rank)
    elif device != "cpu":
        raise UserError(f"device {device!r} cannot run {ranks.world_size} processes: use cpu or cuda")
    if not dist.is_initialized():
        _join(device, ranks)
    return ranks


def is_launched() -> bool:
    """Return whether torchrun is the parent of this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_signals() -> StopSignals:
    """Return the signals that end a training cleanly: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (which Slurm can send).

    torchrun forwards a Ctrl-C that the terminal has already sent to every process. It is counted once.
    """
    more = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
    return StopSignals(more=more, repeat_within=2.0 if is_launched() else 0.0)


def device_mesh(device: torch.device, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return all processes as a mesh of `shape`. A single process gets its own group."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device.type), store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shutdown_distributed() -> None:
    """Leave the process group, if there is one. Call it in a `finally` block.

    Without an exception it waits for the other processes first. With one it tells the others, and their heartbeats end
    them with this message.

    Raises:
        SystemExit: the exception only says that another process has ended. One line says why.
    """
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if dist.get_world_size() > 1:
        if error is not None:
            first = publish_failure(dist.get_rank(), error)
            if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONNECTION):
                reason = first or "another process has disappeared"
                sys.stderr.write(f"error: {reason}; process {dist.get_rank()} ends too\n")
                raise SystemExit(1) from None  # not with the traceback of the library that noticed it
            return  # a normal exit would wait for processes inside a collective operation
        with suppress(RuntimeError):  # torchrun and its store have ended
            barrier()
            stop_heartbeat()
            _leave_store()
    dist.destroy_process_group()


def _leave_store() -> None:
    """Let process 0, which may hold the store, leave it last. Otherwise torch would print warnings in the others."""
    store, others = _store(), dist.get_world_size() - 1
    if dist.get_rank() != 0:
        store.add("left", 1)
        return
    until = time.monotonic() + GRACE
    while store.add("left", 0) < others and time.monotonic() < until:
        time.sleep(BARRIER_POLL)


def barrier() -> None:
    """Wait until every process is here, without a time limit."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = _store()
    number = store.add(f"barrier/of/{dist.get_rank()}", 1)
    store.add(f"barrier/{number}", 1)
    while store.add(f"barrier/{number}", 0) < dist.get_world_size():
        time.sleep(BARRIER_POLL)


def broadcast_value(value: T, source: int = 0) -> T:
    """Return the `value` of process `source` on every process. It must be a JSON value: no pickle is sent."""
    return gather_values(value)[source]


def gather_values(value: Any) -> list[Any]:
    """Return the `value` of every process, by rank, on every process. Each must be a JSON value."""
    if not dist.is_initialized():
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(size) for size in sizes)
    room = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(room, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(room, sizes, strict=True)]


@contextmanager
def only_one(resource: AbstractContextManager, ranks: Ranks) -> Iterator[None]:
    """Enter `resource` (such as a lock) in the main process, for all. If the main process cannot, no process enters.

    Raises:
        UserError: the error of the main process. The others end with exit code 2 without a message.
    """
    with ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                stack.enter_context(resource)
            except UserError as error:
                problem = error
        if broadcast_value(problem is not None):
            raise problem or SystemExit(2)
        yield


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of `values` over the processes, as a new tensor of the same shape, dtype and device."""
    mean = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)  # a sum, because gloo has no mean
        mean /= dist.get_world_size()
    return mean


def any_process(flag: bool) -> bool:
    """Return on every process whether `flag` is true on any process."""
    votes = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def all_processes(flag: bool) -> bool:
    """Return on every process whether `flag` is true on all of them."""
    return not any_process(not flag)


def share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return every `world_size`-th item, from item `rank` on. Over all ranks every item occurs exactly once."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
    return items[rank::world_size]


def processes_here(ranks: Ranks) -> int:
    """Return how many processes of the job share this machine's RAM. If the launcher does not tell, all of them."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(here) if here.isdecimal() and int(here) > 0 else ranks.world_size


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`. "auto" is CUDA, else MPS, else CPU.

    A GPU that is named by its number becomes the current one, because some kernels and libraries use the current one.
    Raises UserError if the device is unknown or not available.
    """
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
    if device.type != "cuda" and device.index:
        raise UserError(f"device {name!r} does not exist: there is one {device.type}, without a number")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def share_cores(device: torch.device, ways: int = 2) -> None:
    """On a CPU, let each of `ways` threads that compute at the same time use its share of the cores.

    Otherwise each would use all cores and, with small models, mostly wait for the others.
    If OMP_NUM_THREADS is set, it decides.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ways))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`. "auto" is bfloat16 on CUDA, else float32. Raises UserError if unknown."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _backend(device: str) -> str:
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def _store() -> dist.Store:
    """Return the key-value store of the job."""
    return dist.distributed_c10d._get_default_store()


def _join(device: str, ranks: Ranks) -> None:
    """Find the other processes, join them in a group, and start the heartbeat."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=RENDEZVOUS))
        dist.init_process_group(
            _backend(device), store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=UNLIMITED
        )
        own_store = connect(RENDEZVOUS)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {ranks.rank} of {ranks.world_size} cannot join the others at {address}: {reason}; check that all "
            "were started and can reach this address"
        ) from error
    Heartbeat(own_store, ranks.rank, ranks.world_size).start()


def _ranks_from_environment() -> Ranks:
    """Read the ranks that torchrun or a Slurm script has set. If neither has, this is a single process."""
    given = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
    if not given:
        return Ranks()
    world_size = _environment_int("WORLD_SIZE", given)
    if world_size == 1:
        return Ranks()
    ranks = Ranks(_environment_int("RANK", given), world_size, _environment_int("LOCAL_RANK", given))
    if not 0 <= ranks.rank < ranks.world_size or ranks.local_rank < 0:
        raise UserError(
            f"RANK={ranks.rank}, LOCAL_RANK={ranks.local_rank}, WORLD_SIZE={ranks.world_size}: a rank lies in "
            "[0, WORLD_SIZE); start with torchrun, or unset these variables for a single process"
        )
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"{', '.join(given)} are set, but MASTER_ADDR is not: start with torchrun, set MASTER_ADDR and "
            "MASTER_PORT, or unset these variables for a single process"
        )
    if not 0 < _environment_int("MASTER_PORT", given) < 65536:
        raise UserError(f"environment variable MASTER_PORT={os.environ['MASTER_PORT']} is not a port: use 1 to 65535")
    return ranks


def _environment_int(name: str, given: Sequence[str]) -> int:
    if name not in os.environ:
        raise UserError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set, but {name} is not: start with torchrun, set "
            "it, or unset the others for a single process"
        )
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(
            f"environment variable {name}={os.environ[name]!r} is not a whole number: start with torchrun"
        ) from error
