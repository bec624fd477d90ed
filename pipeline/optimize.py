"""Make a loaded denoiser faster from outside: fused projections, 8-bit products, compilation, CUDA graphs.

For inference only: what is done here changes no result beyond rounding (8 bits excepted), and no name on disk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import nn

from model.transformer import WanTransformer
from pipeline.sequence_parallel import shard_sequence
from utils.errors import UserError

log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
COMPILE_LIMIT = 64
"""Graphs a process may compile, some five for each resolution, batch size and window it meets; torch's default is 8."""


class CompileMode(Enum):
    """How the blocks are compiled."""

    off = "off"
    """Not at all."""
    default = "default"
    """By torch.compile, one graph for all blocks."""
    cudagraphs = "cudagraphs"
    """Also recorded as CUDA graphs, one for each length of the context."""
    autotune = "autotune"
    """As cudagraphs, with kernels chosen by trial: minutes to start."""


class Quantization(Enum):
    """Precision of the blocks' matrix products."""

    off = "off"
    """That of the model."""
    int8 = "int8"
    """Weights in 8-bit integers: half the memory of bfloat16, any device."""
    int8_dynamic = "int8_dynamic"
    """Weights and activations in 8-bit integers."""
    fp8 = "fp8"
    """Weights and activations in 8-bit floats, a scale for each row; NVIDIA Ada, Hopper and later."""


@dataclass
class OptimizeConfig:
    """What to do to a denoiser before inference."""

    fuse_qkv: bool = True
    """Project q, k and v of self-attention in one product."""
    compile: CompileMode = CompileMode.off
    """Compile the blocks; the first chunks then take minutes on a large model."""
    quantize: Quantization = Quantization.off
    """8-bit matrix products."""
    sequence_parallel: bool = False
    """Under torchrun, all processes make one stream together, each with part of the tokens of every frame."""


def optimize(transformer: WanTransformer, config: OptimizeConfig, *, streamed: bool = False) -> None:
    """Prepare a transformer, in place, for inference.

    Args:
        streamed: the blocks' weights have no values between passes, so products are fused and nothing else is done.

    Raises:
        UserError: 8-bit floats on a device that has none, or torchao is missing.
    """
    transformer.requires_grad_(False)
    if config.fuse_qkv:
        for block in transformer.blocks:
            block.self_attn.fuse(keep_parts=streamed)
    if streamed:
        return
    if config.quantize is not Quantization.off:
        quantize(transformer.blocks, config.quantize)
    if config.sequence_parallel and dist.is_initialized():
        shard_sequence(transformer)
    if config.compile is not CompileMode.off:
        compile_blocks(transformer, config.compile)


def quantize(blocks: nn.Module, kind: Quantization) -> None:
    """Replace the weights of every linear layer by 8-bit ones."""
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


def compile_blocks(transformer: WanTransformer, mode: CompileMode, *, backend: str = "inductor") -> None:
    """Compile the blocks.

    A block gets its own cache, and positions reach it as tensors (rotary tables, cache slots). So one graph serves
    every layer: it is compiled for the first chunk, for the growing context (whose length is a symbol) and for context
    passes, and never again. CUDA graphs are recorded of all blocks in a row, which are then one graph.

    Args:
        backend: compiler of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILE_LIMIT)
    transformer.static_cache = True
    if mode is CompileMode.default:
        for block in transformer.blocks:
            block.compile(fullgraph=True, backend=backend)
        return
    modes = {CompileMode.cudagraphs: "reduce-overhead", CompileMode.autotune: "max-autotune"}
    transformer.blocks.compile(fullgraph=True, backend=backend, mode=modes[mode])
