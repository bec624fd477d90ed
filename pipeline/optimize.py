"""Make a loaded denoiser or codec faster from outside: fused projections and kernels, 8-bit products, compilation.

For inference only: what is done here changes no result beyond rounding (8 bits excepted), and no name on disk.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from model.codec import VideoCodec
from model.eight_bits import round_linears
from model.fused_block import FusedBlock
from model.fused_ops import missing_for_kernels
from model.transformer import WanTransformer
from model.wan_vae import WanVAE
from pipeline.rollout import RolloutConfig
from pipeline.sequence_parallel import shard_sequence
from pipeline.steps import most_steps
from utils.errors import UserError

log = logging.getLogger(__name__)

COMPILED_FOLDER = Path("~/.cache/self-forcing/compiled").expanduser()
"""The folder for compiled code between runs, unless TORCHINDUCTOR_CACHE_DIR names another one. Only the user can write
there, because the code is run. The default folder of torch is open to everybody."""
FP8_CAPABILITY = (8, 9)
COMPILE_SECONDS = 30
"""Seconds that compiling one graph for all blocks takes, on the high side; all of them as one graph took 207 s."""
COMPILED_GAIN = 0.13
"""The share of the denoiser's time that compiling saves, measured on an H200."""
PLAIN_FLOPS = 430e12
"""FLOPs per second of a denoiser that is not compiled, measured on an H200."""
COMPILE_LIMIT = 64
"""Graphs a process may compile, some five for each resolution, batch size and window it meets; torch's default is 8."""


class CompileMode(Enum):
    """How the blocks are compiled."""

    auto = "auto"
    """Like default on a CUDA device if the planned work is long enough to repay compilation; else no compilation."""
    off = "off"
    """No compilation."""
    default = "default"
    """torch.compile, one graph for all blocks."""
    cudagraphs = "cudagraphs"
    """Like default, and recorded as CUDA graphs, one for each length of the context."""
    autotune = "autotune"
    """Like cudagraphs, with kernels chosen by trial. The start takes minutes."""


class Quantization(Enum):
    """The precision of the blocks' matrix products."""

    off = "off"
    """The precision of the model."""
    int8 = "int8"
    """Weights in 8-bit integers: half the memory of bfloat16, any device."""
    int8_dynamic = "int8_dynamic"
    """Weights and activations in 8-bit integers."""
    fp8 = "fp8"
    """Weights and activations in 8-bit floats with a scale for each row. NVIDIA Ada, Hopper and later."""
    fp8_rounded = "fp8_rounded"
    """The same values, multiplied in the precision of the model: any device, and slow. It shows the quality of fp8."""


class Kernels(Enum):
    """Which code computes norms, rotations, residuals and the codec's activations."""

    torch = "torch"
    """torch, or what its compiler makes of it."""
    triton = "triton"
    """The Triton kernels of model/fused_ops.py, on CUDA. No GPU has measured them yet."""


@dataclass
class OptimizeConfig:
    """The optimizations of a denoiser before inference."""

    fuse_qkv: bool = True
    """Project q, k and v of self-attention in one product."""
    compile: CompileMode = CompileMode.auto
    """Compile the blocks. The first chunks then take about half a minute longer."""
    quantize: Quantization = Quantization.off
    """8-bit matrix products."""
    kernels: Kernels = Kernels.torch
    """triton: fused kernels in the denoiser's blocks and in the Wan VAE; see docs/performance.md, "Fused kernels"."""
    codec_winograd: bool = False
    """Let the Wan VAE convolve over time by Winograd's F(2, 3) on a GPU too, as it always does on a CPU. Unmeasured."""
    sequence_parallel: bool = False
    """Under torchrun, all processes make one stream together. Each computes a part of the tokens of every frame."""


def optimize(
    transformer: WanTransformer, config: OptimizeConfig, *, streamed: bool = False, flops_ahead: float = math.inf
) -> None:
    """Prepare a transformer, in place, for inference.

    Args:
        flops_ahead: the work of all coming passes. It decides if compiling is worth its time. Infinite for an endless
            stream.
        streamed: the blocks' weights have no values between passes, so products are fused and nothing else is done.

    Raises:
        UserError: the device does not support 8-bit floats, or torchao is missing.
    """
    transformer.requires_grad_(False)
    if config.fuse_qkv or config.kernels is Kernels.triton:
        for block in transformer.blocks:
            block.self_attn.fuse(keep_parts=streamed)
    if streamed:
        return
    if config.quantize is not Quantization.off:
        quantize(transformer.blocks, config.quantize)
    if config.kernels is Kernels.triton:
        fuse_blocks(transformer)
    if config.sequence_parallel and dist.is_initialized():
        shard_sequence(transformer)
    mode = config.compile
    if mode is CompileMode.auto:
        mode, reason = choose_mode(transformer.patch_embedding.weight.device, flops_ahead)
        log.info("optimize.compile=auto: %s, %s", mode.value, reason)
    if mode is not CompileMode.off:
        compile_blocks(transformer, mode)


def choose_mode(device: torch.device, flops_ahead: float) -> tuple[CompileMode, str]:
    """Decide whether to compile. Returns the mode and the reason in words.

    The rate and the gain were measured on an H200 (four steps of the sixth chunk: 344 ms, compiled 300 ms). A slower
    device gains more seconds, so the choice is cautious there.
    """
    if device.type != "cuda":
        return CompileMode.off, f"compiling gains little on {device.type}"
    if find_spec("triton") is None:
        return CompileMode.off, "triton is not installed"
    saved = flops_ahead / PLAIN_FLOPS * COMPILED_GAIN
    if saved < COMPILE_SECONDS:
        return CompileMode.off, f"compiling would save {saved:.0f} s of this run and take {COMPILE_SECONDS} s"
    said = "this run has no end" if math.isinf(saved) else f"it saves at least {saved:.0f} s of this run"
    return CompileMode.default, f"{said}; the first chunks take about {COMPILE_SECONDS} s longer"


def rollout_flops(transformer: WanTransformer, rollout: RolloutConfig, *, frames: int, tokens: int) -> float:
    """Return the FLOPs of the passes of one video of ``frames`` latent frames, each of ``tokens`` tokens."""
    sizes, size = transformer.config, rollout.frames_per_chunk
    ends = range(size, frames + size, size)
    seen = sum(min(end, rollout.window or end) for end in ends) * tokens
    weights = sum(parameter.numel() for parameter in transformer.blocks.parameters())
    products = 2 * weights * size * tokens * len(ends)
    attention = 4 * seen * size * tokens * sizes.dim * sizes.num_layers
    return (products + attention) * (most_steps(rollout.denoising_steps) + 1)


def quantize(blocks: nn.Module, kind: Quantization) -> None:
    """Replace the weights of every linear layer by 8-bit ones."""
    if kind is Quantization.fp8_rounded:
        round_linears(blocks)
        return
    device = next(blocks.parameters()).device
    if kind is Quantization.fp8 and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    ):
        raise UserError(f"optimize.quantize=fp8 needs an NVIDIA GPU of Ada, Hopper or later, not {device}; use int8")
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise UserError(f"optimize.quantize={kind.value} needs torchao: pip install torchao") from error
    match kind:
        case Quantization.int8:
            scheme = ao.Int8WeightOnlyConfig()
        case Quantization.int8_dynamic:
            scheme = ao.Int8DynamicActivationInt8WeightConfig()
        case Quantization.fp8:
            scheme = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    ao.quantize_(blocks, scheme)


def fuse_blocks(transformer: WanTransformer) -> None:
    """Let the blocks compute with the operators of :mod:`model.fused_ops`; their products must be joined already.

    Raises:
        UserError: triton is not installed, or the device is not CUDA.
    """
    require_kernels(next(transformer.parameters()).device)
    for layer, block in enumerate(transformer.blocks):
        transformer.blocks[layer] = FusedBlock(block)
    transformer.use_static_cache()


def optimize_codec(codec: VideoCodec, config: OptimizeConfig) -> None:
    """Choose how a codec computes; a TinyVAE has one way only.

    Raises:
        UserError: `kernels=triton` without triton or CUDA.
    """
    if not isinstance(codec, WanVAE):
        return
    if config.kernels is Kernels.triton:
        require_kernels(codec.vae.device)
        codec.compute_with(fused=True, folded=True)
    if config.codec_winograd:
        codec.compute_with(winograd=True)


def require_kernels(device: torch.device) -> None:
    """Raise UserError if the kernels of :mod:`model.fused_ops` cannot run on this device."""
    if lacking := missing_for_kernels(device):
        raise UserError(f"optimize.kernels=triton needs {lacking}; use optimize.kernels=torch")


def compile_blocks(transformer: WanTransformer, mode: CompileMode, *, backend: str = "inductor") -> None:
    """Compile the blocks.

    A block gets its own cache, and positions reach it as tensors (rotary tables, cache slots). So one graph serves
    every layer: it is compiled for the first chunk, for the growing context (whose length is a symbol) and for context
    passes, and never again. CUDA graphs are recorded of all blocks in a row, which are then one graph.

    Args:
        backend: compiler of torch.compile.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED_FOLDER))  # later runs reuse the compiled code
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILE_LIMIT)
    transformer.use_static_cache()
    if mode is CompileMode.default:
        for block in transformer.blocks:
            block.compile(fullgraph=True, backend=backend)
        return
    modes = {CompileMode.cudagraphs: "reduce-overhead", CompileMode.autotune: "max-autotune"}
    transformer.blocks.compile(fullgraph=True, backend=backend, mode=modes[mode])
