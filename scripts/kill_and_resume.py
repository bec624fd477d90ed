"""Kill a training at random moments, resume it each time, and compare its end with that of one left alone, bit by bit.

python scripts/kill_and_resume.py --config_path configs/shapes/self_forcing_dmd.yaml --logdir logs/kills \
    [--kills 50] [--processes 2] [trainer.steps=100 trainer.save_every=2 ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

SLOW_IMPORTS = (
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.tokenization_auto",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "imageio",
)

UNFINISHED = ".step_*.unfinished"
NOT_REPEATED = ("seconds", "memory", "samples_per_second")
"""Beginnings of the metrics that tell of the machine."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="as for train.py")
    parser.add_argument("--logdir", required=True, help="a new folder, for both runs")
    parser.add_argument("--kills", type=int, default=50, help="how often to send SIGKILL")
    parser.add_argument("--processes", type=int, default=1, help="of the training, on this machine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", help="any key of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from utils.errors import UserError

    logdir = Path(args.logdir)
    if logdir.exists():
        raise UserError(f"--logdir={logdir} exists; name a new folder")
    whole, killed = logdir / "whole", logdir / "killed"
    flags = ["--config_path", args.config_path, "--no_visualize", *args.overrides]
    started = time.monotonic()
    wait(launch([*flags, "--logdir", str(whole)], args.processes))
    during_save = kill_often(
        [*flags, "--logdir", str(killed)], args.processes, args.kills, time.monotonic() - started, args.seed
    )
    differences = compare(whole, killed)
    if differences:
        raise UserError(f"{killed} ends differently from {whole}: {', '.join(differences[:5])}")
    print(
        f"{args.kills} kills, {during_save} of them while a checkpoint was being written: parameters, averages, "
        "optimizers, data position and metrics end equal to the last bit"
    )


def kill_often(arguments: list[str], processes: int, kills: int, duration: float, seed: int) -> int:
    """Kill a run ``kills`` times within about the ``duration`` it would take, then let it end.

    Returns:
        how often a checkpoint was left unfinished.
    """
    moments, during_save = random.Random(seed), 0
    folder = Path(arguments[arguments.index("--logdir") + 1]) / "checkpoints"
    for _ in range(kills):
        before = step_reached(folder)
        group = launch(arguments, processes)
        # At any moment up to the next checkpoint's being written, or soon after, so that the run gets on.
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
    """The newest step with a checkpoint; 0 without."""
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)


def launch(arguments: Sequence[str], processes: int = 1) -> list[BaseProcess]:
    """Start train.py in fresh processes, as torchrun does; imports are shared, so that it takes no time.

    What they log goes to ``<logdir>.<rank>.log``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "trainer.build", *SLOW_IMPORTS])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(processes)
    ]
    group = [context.Process(target=_train, args=(list(arguments), place)) for place in places]
    for each in group:
        each.start()
    return group


def wait(group: Sequence[BaseProcess], timeout: float | None = None) -> None:
    """Wait until every process has ended well.

    Raises:
        UserError: one has not.
    """
    from utils.errors import UserError

    for each in group:
        each.join(timeout)
    codes = [each.exitcode for each in group]
    if any(codes):
        raise UserError(f"the training ended with {codes}; see the .log files beside its folder")


def compare(first: Path, second: Path) -> list[str]:
    """Names of what differs between the ends of two runs: tensors and values of the last checkpoint, metrics."""
    import torch

    from utils.checkpoint import read_about, read_tensors
    from utils.checkpoint_search import latest_checkpoint

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
    """The metrics that must be the same in an equal run, step by step."""
    import json

    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(NOT_REPEATED)} for line in lines]


def _train(arguments: list[str], environment: dict[str, object]) -> None:
    import train

    os.environ |= {name: str(value) for name, value in environment.items()}
    logdir = Path(arguments[arguments.index("--logdir") + 1])
    logdir.parent.mkdir(parents=True, exist_ok=True)
    with logdir.with_name(f"{logdir.name}.{environment['RANK']}.log").open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    sys.exit(train.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
