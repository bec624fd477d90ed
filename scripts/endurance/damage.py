"""Damage a checkpoint in many ways. A run must find the damage and go on from the newest good checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from scripts.endurance.figures import Figure
from utils.checkpoint import Checkpoints, KeepPolicy, load_checkpoint
from utils.checkpoint_files import DamagedCheckpoint, read_manifest, verify
from utils.checkpoint_search import find_good_checkpoint

LARGE = 256 * 2**20
"""Bytes of the checkpoint that is written, verified and loaded to measure the speed."""


def run(folder: Path) -> list[Figure]:
    """Flip every bit, damage every file, cut at every length, and time the verification."""
    logging.basicConfig(level=logging.ERROR)  # hides dozens of expected warnings
    return [*flipped_bits(folder / "flips"), *damaged_files(folder / "files"), *speed(folder / "speed")]


def saved(folder: Path, steps: tuple[int, ...] = (4, 6), size: int = 3) -> Path:
    """Write checkpoints of some steps. Return the folder of the newest one."""
    checkpoints = Checkpoints(folder, KeepPolicy(9))
    for step in steps:
        checkpoints.save(step, {"net": nn.Linear(size, size)}, {})
    return folder / f"step_{steps[-1]:08d}"


def is_found(checkpoint: Path) -> bool:
    """Return whether verification finds damage in a checkpoint."""
    try:
        verify(checkpoint, read_manifest(checkpoint))
    except DamagedCheckpoint:
        return True
    return False


def flipped_bits(folder: Path) -> list[Figure]:
    """Flip every bit of every file, and cut every file at every length."""
    checkpoint = saved(folder)
    flips = cuts = missed_flips = missed_cuts = 0
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        for place in range(8 * len(data)):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            flips, missed_flips = flips + 1, missed_flips + (not is_found(checkpoint))
        for length in range(len(data)):
            path.write_bytes(data[:length])
            cuts, missed_cuts = cuts + 1, missed_cuts + (not is_found(checkpoint))
        path.write_bytes(data)
    return [
        Figure(f"bits flipped that were not found, of {flips}", missed_flips, "0", not missed_flips and flips > 1000),
        Figure(f"truncations that were not found, of {cuts}", missed_cuts, "0", not missed_cuts and cuts > 100),
    ]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "random bytes": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "of another step": lambda path: shutil.copyfile(path.parents[1] / "step_00000004" / path.name, path),
}


def damaged_files(folder: Path) -> list[Figure]:
    """Damage each file of the newest of three checkpoints in each way, and resume from what is left."""
    cases = wrong = 0
    for damage in DAMAGES.values():
        for name in ("manifest.json", "state.json", "rank_00000.safetensors", "latest"):
            shutil.rmtree(folder, ignore_errors=True)
            newest = saved(folder, (4, 6, 8))
            good = newest if name == "latest" else newest.with_name("step_00000006")
            if name == "latest" and damage is DAMAGES["of another step"]:
                continue
            damage(folder / name if name == "latest" else newest / name)
            found = find_good_checkpoint(folder)
            load_checkpoint(found, {"net": nn.Linear(3, 3)})
            set_aside = name == "latest" or (folder / f"{newest.name}.damaged").is_dir()
            cases, wrong = cases + 1, wrong + (found != good or not set_aside)
    return [Figure(f"damaged checkpoints that a run did not get past, of {cases}", wrong, "0", not wrong)]


def speed(folder: Path) -> list[Figure]:
    """Measure how long a checkpoint takes to write, to verify and to load."""
    size = int((LARGE / 4) ** 0.5)
    net = {"net": nn.Linear(size, size, bias=False)}
    seconds = {}
    started = time.perf_counter()
    Checkpoints(folder, KeepPolicy(1)).save(1, net, {})
    seconds["write, checksums and flush included,"] = time.perf_counter() - started
    started = time.perf_counter()
    checkpoint = find_good_checkpoint(folder)
    seconds["verify"] = time.perf_counter() - started
    started = time.perf_counter()
    load_checkpoint(checkpoint, net)
    seconds["load"] = time.perf_counter() - started
    gib = torch.finfo(torch.float32).bits // 8 * size**2 / 2**30
    return [
        Figure(f"seconds a GiB to {what} of a checkpoint", round(each / gib, 2), "-", True)
        for what, each in seconds.items()
    ]
