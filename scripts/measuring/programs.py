"""Measure whole programs: the start of a process, and training."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from scripts.measuring.bench import Bench, Figures
from scripts.measuring.machine import ROOT

LOADING = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from pipeline.config import PipelineConfig
from scripts.measuring.bench import Bench
from trainer.config import Config
from utils.config import load_config
from utils.distributed import resolve_device
path, random_weights, *overrides = sys.argv[1:]
config = load_config(Config, path, overrides)
bench = Bench(config, resolve_device(config.device), random_weights=random_weights == "random")
imported = time.perf_counter()
denoiser, codec = bench.denoiser(), bench.codec()
bench.text(denoiser.transformer.config)()
print(imported - start, time.perf_counter() - start)
"""


def measure_load(bench: Bench) -> Figures:
    """Measure a new process in wall-clock time: its --help, its imports, and the time until its parts are ready."""
    arguments = [bench.config_path, "random" if bench.random_weights else "stored", *bench.overrides]
    helps, imports, ready = [], [], []
    for _ in range(min(bench.repeats, 3)):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "inference.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - begin)
        command = [sys.executable, "-c", LOADING, *arguments]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        imported, done = map(float, out.stdout.split()[-2:])
        imports.append(imported)
        ready.append(done)
    return {"inference.py --help s": min(helps), "imports s": min(imports), "imports, parts and a prompt s": min(ready)}


def measure_train(bench: Bench) -> Figures:
    """Measure the steps of train.py after the first one, phase by phase."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config_path", bench.config_path, "--logdir", folder]
        flags += ["--disable-wandb", "--no_save", "--no_visualize"]
        command = [sys.executable, "train.py", *flags, *bench.overrides, f"trainer.steps={bench.repeats + 1}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line][1:]
    names = {key for line in steps for key in line if key.startswith("seconds") or key == "samples_per_second"}
    medians = {f"{name} p50": median(line[name] for line in steps if name in line) for name in sorted(names)}
    return medians | {"peak memory GiB": max(line["memory_gib"] for line in steps)}
