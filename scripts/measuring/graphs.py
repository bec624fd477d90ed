"""Count the kernels and bytes of one layer in the code that torch's compiler writes for a Hopper GPU, without a GPU.

The layer is traced with tensors without values. Its graph is moved to a simulated GPU. inductor generates the code and
stops before compiling it. This needs Linux with triton. It uses private modules of torch, so a new release of torch may
need changes here. Nothing else depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, scheduler
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput, MultiOutputLayout
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from model.attention import AttentionBackend
from model.fused_block import FusedBlock
from model.kv_cache import CachedText, KVCache
from model.layer_cache import KeyLayout
from model.layers import Block
from model.transformer import PRESETS, WanConfig
from pipeline.sizes import token_size
from scripts.measuring.bench import Bench, Figures
from scripts.measuring.figures import PATHS

CUDA = torch.device("cuda", 0)
CHUNK = 6
"""The chunk that attends in the layer, counted from 1."""
PRODUCTS = ("addmm", "mm", "bmm", "attention")
"""Kernels whose name contains one of these are products or attention. They are not counted."""


class Kernel(NamedTuple):
    """A kernel of the generated code."""

    name: str
    bytes: float
    """Bytes that the kernel reads and writes."""


class _Captured(Exception):
    """Stops the compiler after it has generated the code, because compiling it needs a GPU."""


def measure_graph(bench: Bench) -> Figures:
    """Count the kernels besides products and attention, and their bytes, with and without the Triton kernels.

    A pass reads or writes the hidden states of a chunk once.
    """
    config = bench.config
    rows, columns = token_size(config)
    tokens = (config.video.height // rows) * (config.video.width // columns)
    figures: Figures = {}
    sizes, frames = PRESETS[config.generator.preset], config.rollout.frames_per_chunk
    for name in PATHS:
        kernels = layer_kernels(sizes, frames, tokens, config.video.num_frames, fused=name == "triton")
        moved = sum(kernel.bytes for kernel in kernels)
        figures[f"{name} kernels a layer"] = len(kernels)
        figures[f"{name} passes a layer"] = moved / (2 * frames * tokens * sizes.dim)
        figures[f"{name} MB a layer"] = moved / 1e6
    return figures


def layer_kernels(sizes: WanConfig, frames: int, tokens: int, clip: int, *, fused: bool) -> list[Kernel]:
    """Return the kernels of one layer besides its products and attention, in bfloat16.

    Args:
        fused: use the Triton kernels.
    """
    block = _layer(sizes, fused)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph, inputs = _traced(block, sizes, frames, tokens, clip)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": CUDA}
        graph.recompile()
        moved = [_on_cuda(x) if isinstance(x, Tensor) else x for x in inputs]
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*moved)
    captured: list[list[Kernel]] = []

    def stop(lowering: GraphLowering) -> None:
        lowering.codegen()
        kernels = [(_name(node), node) for node in lowering.scheduler.nodes]
        captured.append(
            [Kernel(name, _bytes(name, node)) for name, node in kernels if not any(word in name for word in PRODUCTS)]
        )
        raise _Captured

    stopped = mock.patch.object(GraphLowering, "compile_to_module", stop)
    context = torch._guards.tracing(torch._guards.TracingContext(mode))
    with torch.no_grad(), _imagined_gpu(), stopped, context:
        try:
            compile_fx.compile_fx_inner(graph, moved, cudagraphs=False, is_inference=True)
        except Exception:
            if not captured:  # it is not the one that stops the compiler
                raise
    return [kernel for kernel in captured[0] if kernel.bytes]


def _layer(sizes: WanConfig, fused: bool) -> Block:
    """Return a layer without values, prepared for inference."""
    with torch.device("meta"):
        block = Block(sizes.dim, sizes.ffn_dim, sizes.num_heads, sizes.eps).bfloat16().requires_grad_(False)
        block.self_attn.fuse()
    block.ffn[1] = nn.GELU("tanh")  # as GELU computes on a GPU; tracing happens on a CPU
    return FusedBlock(block) if fused else block


def _traced(block: Block, sizes: WanConfig, frames: int, tokens: int, clip: int) -> tuple[GraphModule, list[Any]]:
    """Return the graph of a layer with its cache, in operations that inductor lowers, and its inputs."""
    block = block.to_empty(device="cpu")
    head_dim = sizes.dim // sizes.num_heads
    prompt = torch.empty(1, sizes.text_len, sizes.num_heads, head_dim, dtype=torch.bfloat16)
    cache = KVCache(1)
    cache.reset(clip)
    layout = KeyLayout(1, tokens, sizes.num_heads, head_dim, torch.bfloat16, torch.device("cpu"), static=True)
    chunk = cache.open(layout, (CHUNK - 1) * frames, frames)
    captured: list[Any] = []

    def keep(graph: GraphModule, inputs: list[Any], **options) -> Any:
        captured.extend((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        block, fullgraph=True, backend=lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=keep)
    )
    compiled(
        torch.empty(1, frames, tokens, sizes.dim, dtype=torch.bfloat16),
        torch.empty(1, 1, 6, sizes.dim, dtype=torch.bfloat16),
        CachedText(prompt, prompt.clone(), None),
        torch.empty(frames, tokens, 1, head_dim // 2, 2),
        cache=cache.layers[0],
        chunks=(chunk,),
        backend=AttentionBackend.flash4,
    )
    torch._dynamo.reset()
    return captured[0], captured[1]


def _on_cuda(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def _name(node: BaseSchedulerNode) -> str:
    """Return the function that a kernel calls, or the operations that it computes; "" if it only names an output."""
    if not node.is_extern():
        return node.get_name()
    return getattr(node.node, "python_kernel_name", None) or ""


def _bytes(name: str, node: BaseSchedulerNode) -> float:
    """Return the bytes that a kernel reads and writes. Buffers inside the kernel do not count."""
    mutated = {other for out in node.get_outputs() for other in out.get_mutations()}
    several = [out for out in getattr(node.node, "outputs", []) if isinstance(out, MultiOutput)] if name else []
    total = float(sum(int(out.get_numel()) * out.get_dtype().itemsize for out in several))
    touched: dict[str, float] = {}
    for dep in node.read_writes.reads | node.read_writes.writes:
        grouped = isinstance(getattr(V.graph.get_buffer(dep.name), "layout", None), MultiOutputLayout)
        if name and not grouped and dep.name not in V.graph.removed_buffers and dep.name not in mutated:
            touched[dep.name] = touched.get(dep.name, 0) + _numel(dep)
    for other, numel in touched.items():  # an element that is read twice comes from the cache of the processor
        total += min(numel, int(V.graph.get_numel(other))) * V.graph.get_dtype(other).itemsize
    # It writes as many keys and values to the cache as it returns queries. Their sizes are not in the graph.
    return total * 6 / 4 if "split_qkv" in name else total


def _numel(dep: Any) -> int:
    """Return the number of elements that a kernel reads or writes; the size of the buffer if it is not known."""
    if not isinstance(dep, MemoryDep):
        return int(V.graph.get_numel(dep.name))
    used = dep.var_names if dep.is_indirect() else [name for name in dep.var_names if name in dep.index.free_symbols]
    return math.prod(int(size) for name, size in zip(dep.var_names, dep.size, strict=True) if name in used)


@contextmanager
def _imagined_gpu() -> Iterator[None]:
    """Simulate an H100 for inductor, which reads the properties of the device and computes nothing on it."""
    properties = {
        "multi_processor_count": 132,
        "major": 9,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "warp_size": 32,
    }
    device = SimpleNamespace(
        name="H100", minor=0, gcnArchName="", total_memory=80 << 30, shared_memory_per_block_optin=232448, **properties
    )
    hints = DeviceProperties(type="cuda", index=0, cc=90, **properties)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    answers = {
        "get_device_properties": lambda *_: device,
        "get_device_capability": lambda *_: (9, 0),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda *_: -1,
        "_maybe_exchange_device": lambda *_: -1,
        "_lazy_init": lambda: None,
    }
    with ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        patches.enter_context(mock.patch.object(DeviceProperties, "create", staticmethod(lambda _: hints)))
        patches.enter_context(mock.patch.object(scheduler, "has_triton", lambda *_: True))
        patches.enter_context(mock.patch.object(driver, "_active", target))
        yield
