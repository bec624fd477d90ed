"""Kill a training at random moments and resume it. The result must equal that of a training that was never killed."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from scripts.endurance.figures import Figure
from utils.checkpoint import read_about, read_tensors
from utils.checkpoint_search import latest_checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SLOW_IMPORTS = (
    "train",
    "trainer.run",
    "pipeline.inference.run",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.tokenization_auto",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "av",
)
FOLDERS = {"train": "--logdir", "inference": "--output_folder"}
"""Program -> the option that names its output folder."""
UNFINISHED = ".step_*.unfinished"
NOT_REPEATED = ("seconds", "memory", "samples_per_second")
"""Prefixes of metrics that depend on the machine."""
JOBS = ((1, 30, "trainer.save_in_background=false"), (2, 20, "trainer.save_in_background=true"))
"""(number of processes, number of kills, setting that says how to save)"""
SMALL = (
    "trainer.steps=24",
    "trainer.save_every=2",
    "trainer.batch_size=1",
    "video.num_frames=3",
    "dmd.critic_updates=1",
    "dmd.critic_head_start=2",
    "dmd.replay_rollouts=2",
    "optimizer.warmup_steps=0",
)
"""Settings that make a step take about a second with the Shapes models."""


def run(folder: Path) -> list[Figure]:
    """Kill Self Forcing (DMD) on Shapes 50 times, with one and with two processes."""
    figures = []
    os.environ["OMP_NUM_THREADS"] = "1"
    for processes, kills, saving in JOBS:
        whole, killed = folder / f"whole-{processes}", folder / f"killed-{processes}"
        config = str(ROOT / "configs" / "shapes" / "self_forcing_dmd.yaml")
        flags = ["--config_path", config, "--no_visualize", *SMALL, saving]
        started = time.monotonic()
        wait(launch([*flags, "--logdir", str(whole)], processes))
        duration = time.monotonic() - started
        during_save = kill_often([*flags, "--logdir", str(killed)], processes, kills, duration / 2, seed=processes)
        different = compare(whole, killed)
        name = f"{processes} process{'es' * (processes > 1)}"
        figures += [
            Figure(f"{name}: SIGKILLs", kills, "-", True),
            Figure(f"{name}: of these while a checkpoint was being written", during_save, "-", True),
            Figure(f"{name}: tensors, values and metrics that differ at the end", len(different), "0", not different),
        ]
    return figures


def kill_often(arguments: list[str], processes: int, kills: int, duration: float, seed: int) -> int:
    """Kill a run `kills` times within about `duration` seconds, the time that it takes alone. Then let it end.

    Returns:
        how many times a checkpoint was left unfinished.
    """
    moments, during_save = random.Random(seed), 0
    folder = Path(arguments[arguments.index("--logdir") + 1]) / "checkpoints"
    for _ in range(kills):
        before = step_reached(folder)
        group = launch(arguments, processes)
        # Kill at any moment until shortly after the next checkpoint is written, so that the run makes progress.
        limit, amid = time.monotonic() + moments.uniform(0, duration), moments.random() < 0.5
        while time.monotonic() < limit and all(each.is_alive() for each in group):
            if step_reached(folder) > before or (amid and any(folder.glob(UNFINISHED))):
                break
            time.sleep(0.001)
        time.sleep(moments.expovariate(1 / 0.005 if amid else 1 / 0.1))
        during_save += any(folder.glob(UNFINISHED))
        for each in group:
            each.kill()
            each.join()
    wait(launch(arguments, processes))
    return during_save


def step_reached(folder: Path) -> int:
    """Return the newest step that has a checkpoint, or 0."""
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)


def launch(
    arguments: Sequence[str],
    processes: int = 1,
    *,
    program: str = "train",
    prepare: Callable[[], object] | None = None,
) -> list[BaseProcess]:
    """Start a program in new processes, as torchrun does. They share imported modules, so that they start at once.

    Their output goes to ``<folder>.<rank>.log``.

    Args:
        arguments: the command line of the program.
        processes: number of processes.
        program: one of FOLDERS.
        prepare: a function that each process calls first. It must be importable.
    """
    return start_ranks(_run, (program, list(arguments), prepare), processes)


def start_ranks(work: Callable[..., object], arguments: tuple, processes: int) -> list[BaseProcess]:
    """Call an importable function in fresh processes. Each has the environment that torchrun would give it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SLOW_IMPORTS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(processes)
    ]
    group = [context.Process(target=_in_place, args=(place, work, arguments)) for place in places]
    for each in group:
        each.start()
    return group


def wait(group: Sequence[BaseProcess], timeout: float | None = None) -> None:
    """Wait until every process has ended. Kill a process that still runs after `timeout` seconds.

    Raises:
        UserError: a process failed or had to be killed.
    """
    for each in group:
        each.join(timeout)
    codes = [each.exitcode for each in group]
    for each in group:
        each.kill()
    if any(code != 0 for code in codes):
        raise UserError(f"the processes ended with {codes}, None if killed; see the .log files beside the folder")


def compare(first: Path, second: Path) -> list[str]:
    """Return the names of all tensors and values of the last checkpoint, and metrics, that differ between two runs."""
    folders = [latest_checkpoint(run / "checkpoints") for run in (first, second)]
    tensors, others = read_tensors(folders[0]), read_tensors(folders[1])
    differing = [
        name for name in {*tensors, *others} if name not in {*tensors} & {*others}
        or not torch.equal(tensors[name], others[name])
    ]  # fmt: skip
    states = [read_about(folder) for folder in folders]
    differing += [key for key in ("step", "values") if states[0][key] != states[1][key]]
    lines, other_lines = repeated_metrics(first), repeated_metrics(second)
    differing += [f"metrics of step {index + 1}" for index, pair in enumerate(zip(lines, other_lines, strict=False))
                  if pair[0] != pair[1]]  # fmt: skip
    return sorted(differing) + ["number of metrics"] * (len(lines) != len(other_lines))


def repeated_metrics(logdir: Path) -> list[dict[str, float]]:
    """Return, for each step, the metrics that must be the same in an equal run."""
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(NOT_REPEATED)} for line in lines]


def log_file(folder: Path, rank: int = 0) -> Path:
    """Return the log file of a process of :func:`launch`."""
    return folder.with_name(f"{folder.name}.{rank}.log")


def _in_place(place: dict[str, object], work: Callable[..., object], arguments: tuple) -> None:
    os.environ |= {name: str(value) for name, value in place.items()}
    work(*arguments)


def _run(program: str, arguments: list[str], prepare: Callable[[], object] | None) -> None:
    folder = Path(arguments[arguments.index(FOLDERS[program]) + 1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log_file(folder, int(os.environ["RANK"])).open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    if prepare is not None:
        prepare()
    sys.exit(importlib.import_module(program).main(arguments))
