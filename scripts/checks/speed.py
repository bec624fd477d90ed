"""The table of doctor.py --benchmark: measurements of benchmark.py, on a GPU with random weights of full size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pipeline import memory
from pipeline.config import load_pipeline_config
from scripts.checks.facts import installed, preset_sizes
from scripts.measuring.bench import Bench, Figures
from scripts.measuring.figures import COMPILED_ROW, FP8_ROW, FULL_ROW
from scripts.runs.benchmark import make_measurement

FULL, SHAPES = "configs/self_forcing_dmd.yaml", "configs/shapes/self_forcing_dmd.yaml"
TAEHV, COMPILED = ("codec.kind=tiny",), ("optimize.compile=default",)
TINY = ("generator.preset=shapes", *TAEHV)


class Row(NamedTuple):
    """A measurement of the table."""

    title: str
    name: str
    """Its name in benchmark.py."""
    config_path: str
    overrides: tuple[str, ...] = ()
    repeats: int = 3


def rows(device: torch.device) -> Iterator[Row]:
    """Yield the measurements for a device."""
    if device.type == "cuda":
        yield Row(FULL_ROW, "inference", FULL)
        yield Row(COMPILED_ROW, "inference", FULL, COMPILED)
        if installed("torchao"):
            yield Row(FP8_ROW, "inference", FULL, (*COMPILED, "optimize.quantize=fp8"))
        yield Row("session, Wan VAE", "session", FULL)
        yield Row("session, Wan VAE, compiled", "session", FULL, COMPILED)
        yield Row("session, TAEHV", "session", FULL, TAEHV)
        yield Row("session, TAEHV, compiled", "session", FULL, (*COMPILED, *TAEHV))
        yield Row("Wan VAE, 81 frames", "codec", FULL)
        yield Row("TAEHV, 81 frames", "codec", FULL, TAEHV)
    else:
        yield Row("Shapes at 64x64", "inference", SHAPES, TINY)
        yield Row("session", "session", SHAPES, TINY)
        yield Row("several viewers", "viewers", SHAPES, TINY, repeats=1)
    yield Row("rollout over bare products", "floor", FULL)
    if installed("diffusers"):
        yield Row("one pass, beside diffusers", "peer", FULL)
        yield Row("Wan VAE, beside diffusers", "codec_peer", FULL, repeats=1)


def measure_row(row: Row, device: torch.device) -> Figures:
    """Return the figures of a row, named as in benchmark.py."""
    config = load_pipeline_config(row.config_path, row.overrides)
    bench = Bench(config, device, config_path=row.config_path, repeats=row.repeats, random_weights=True)
    figures = make_measurement(row.name, bench)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if row.name == "inference":
            sizes = preset_sizes(config, device, bench.dtype)
            needed = memory.need(memory.PROFILES[0], sizes, one_memory=False).device
            figures["estimated memory GiB"] = needed / 2**30
    return figures
