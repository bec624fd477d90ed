"""Facts about this machine: hardware, versions, packages, kernels, and the memory that videos need."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from model.kernels import AttentionBackend, missing, resolve_backend
from model.transformer import PRESETS, WanTransformer
from pipeline import memory
from pipeline.config import PipelineConfig
from scripts.measuring.machine import cpu_name, machine
from scripts.measuring.random_codec import random_codec
from utils.errors import UserError

PACKAGES = (
    *("einops", "safetensors", "transformers", "accelerate", "av", "diffusers", "gradio", "triton", "torchao"),
    *("flash-attn-4", "flash-attn", "flash-attn-3", "sageattention"),
)


def hardware(device: torch.device) -> dict[str, str]:
    """Return name -> value: system, processor, memory, graphics card, driver and versions."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": cpu_name(),
        "free RAM": f"{memory.free_ram() / memory.GB:.1f} GB",
        "device": str(device),
        **{name: str(value) for name, value in machine(device).items() if name != "device"},
        "compiler": compiler(device) or "none: torch.compile cannot be used",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "graphics card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"capability {properties.major}.{properties.minor}",
            "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        }
    return facts


def compiler(device: torch.device) -> str | None:
    """Return the compiler that torch.compile uses for this device; None if it is missing."""
    if device.type == "cuda":
        return f"triton {installed('triton')}" if installed("triton") else None
    return shutil.which("g++") or shutil.which("clang++")


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages() -> dict[str, str]:
    """Return package -> version, for required and optional packages."""
    return {name: installed(name) or "-" for name in PACKAGES}


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return attention kernel -> whether it can run here, and "auto" -> the kernel that it uses."""
    lines = {}
    chosen = resolve_backend(AttentionBackend.auto, device, dtype)
    for backend in AttentionBackend:
        if backend is AttentionBackend.auto:
            continue
        lacking = missing(backend, device, dtype)
        lines[backend.value] = "can run" if lacking is None else f"needs {lacking}"
    text = "" if chosen.for_text() is chosen else f", and {chosen.for_text().value} for prompts"
    return {"auto": f"uses {chosen.value}{text}: the fastest that can run with {dtype}", **lines}


def memory_profile(config: PipelineConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the memory profile for videos of a configuration on this machine, or why they do not fit.

    If the weights are not on disk, the sizes of the preset are used, and the prompts count as already embedded.
    """
    try:
        return memory.plan(config, device=device, dtype=dtype).line
    except UserError as error:
        if "does not exist" not in str(error) and "not found" not in str(error) and "no such" not in str(error).lower():
            return str(error)
    try:
        sizes = preset_sizes(config, device, dtype)
        return memory.choose_profile(config, sizes, device=device, text=False).line + " (weights are not on disk)"
    except UserError as error:
        return str(error)


def preset_sizes(config: PipelineConfig, device: torch.device, dtype: torch.dtype) -> memory.Sizes:
    """Return the sizes of full-size parts whose files are missing."""
    sizes = PRESETS[config.generator.preset]
    with torch.device("meta"):
        transformer = WanTransformer(sizes).to(dtype)
        codec = random_codec(config)
    states = transformer.state_dict(), {}, codec.to(dtype).state_dict()
    return memory.sizes(config, sizes, *states, device=device, dtype=dtype)
