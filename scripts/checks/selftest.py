"""Small checks of every code path on a device. Each compares with the CPU in float32, within a stated bound.

A check is a function that returns its result in words. It raises CheckFailed or another error if the result is wrong,
and Skipped if the device or a package cannot run it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from threading import Thread

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from model import fused_ops
from model.attention import attention, block_causal_mask, flex_mask
from model.kernels import AttentionBackend, missing, resolve_backend, run_kernel
from model.layers import LayerNorm
from model.wan_decoder import CausalConv, ChannelNorm, activate
from pipeline.optimize import CompileMode
from pipeline.request import StreamRequest
from pipeline.session import StreamSession
from pipeline.text_to_video import TextToVideo
from scripts.checks.facts import compiler
from scripts.checks.parts import (
    LATENT,
    RULES,
    difference,
    prepared_denoiser,
    random,
    reference,
    rolled_out,
    tiny_denoiser,
    tiny_pipeline,
)
from scripts.checks.training import training_losses

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Largest relative difference of latents."""
LEVELS = {torch.float32: 0.5, torch.bfloat16: 6.0}
"""Largest mean difference of pixels, in levels of 255."""
KERNEL_BOUND, EIGHT_BIT_BOUND = 0.02, 0.1
GRAPHS = 6
"""The most graphs that a rollout needs: for a first chunk, a growing and a full window, to denoise and to commit."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckFailed(Exception):
    """A result is outside its bound."""


class Skipped(Exception):
    """This machine lacks what the check needs."""


@dataclass(frozen=True)
class Check:
    """A check and its name."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Outcome:
    """The result of a check."""

    name: str
    state: str
    """ok, failed or skipped."""
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.state:8}{self.name:44}{self.seconds:6.1f} s  {self.detail}"

    def as_dict(self) -> dict[str, str | float]:
        """Return the outcome for JSON."""
        return asdict(self)


def perform(check: Check) -> Outcome:
    """Run a check. An error becomes part of the outcome."""
    begin = time.perf_counter()
    try:
        state, detail = "ok", check.run()
    except Skipped as reason:
        state, detail = "skipped", str(reason)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        state, detail = "failed", message if isinstance(error, CheckFailed) else f"{type(error).__name__}: {message}"
    return Outcome(check.name, state, detail, time.perf_counter() - begin)


def all_checks(device: torch.device) -> Iterator[Check]:
    """Yield every check for a device. A check comes after the checks whose parts it uses."""
    kernels = [backend for backend in AttentionBackend if backend is not AttentionBackend.auto]
    for backend in kernels:
        yield Check(f"attention kernel {backend.value}", partial(check_kernel, device, backend))
    yield Check("Triton kernels", partial(check_triton, device))
    yield Check("attention under a mask", partial(check_mask, device))
    yield Check("attention kernels in two threads", partial(check_threads, device))
    for name, dtype in DTYPES.items():
        yield Check(f"rollout in {name}", partial(check_rollout, device, dtype))
    for name, dtype in DTYPES.items() if device.type == "cuda" else [("float32", torch.float32)]:
        yield Check(f"rollout in {name}, compiled", partial(check_compiled, device, dtype))
    for kind in ("wan", "tiny"):
        for name, dtype in DTYPES.items():
            yield Check(f"session with the {kind} codec in {name}", partial(check_session, device, kind, dtype))
    yield Check("two sessions in turn", partial(check_two_sessions, device, CompileMode.off))
    yield Check("two sessions in turn, CUDA graphs", partial(check_two_sessions, device, CompileMode.cudagraphs))
    yield Check("training step", partial(check_training, device, False))
    yield Check("training step, compiled", partial(check_training, device, True))


def within(value: float, bound: float, what: str = "relative difference") -> str:
    """Return a text about a difference. Raises CheckFailed if it is above its bound."""
    if not value <= bound:
        raise CheckFailed(f"{what} {value:.2g} is above {bound:g}")
    return f"{what} {value:.2g} (at most {bound:g})"


def check_kernel(device: torch.device, backend: AttentionBackend) -> str:
    """Compare an attention kernel with plain matrix products and a softmax."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lacking = missing(backend, device, dtype)
    if lacking is not None:
        raise Skipped(f"needs {lacking}")
    q, k, v = (random(2, length, 2, 128, seed=length) for length in (200, 520, 520))
    weights = torch.einsum("blnd,bsnd->bnls", q, k).div(128**0.5).softmax(-1)
    expected = torch.einsum("bnls,bsnd->blnd", weights, v)
    made = run_kernel(backend, *(x.to(device, dtype) for x in (q, k, v))).float().cpu()
    return within(difference(made, expected), EIGHT_BIT_BOUND if backend.has_8_bits else KERNEL_BOUND)


def check_triton(device: torch.device) -> str:
    """Compare the optional Triton kernels for norms of the denoiser and the Wan VAE with the plain ones on the CPU."""
    norm, conv = LayerNorm(1536, 1e-6, elementwise_affine=False), CausalConv(96, 96)
    x, signals, frames = random(1, 3, 40, 1536), random(1, 3, 2, 1536, seed=1), random(2, 6, 8, 96, seed=2)
    shift, scale = signals[:, :, :, None].unbind(2)
    rms = ChannelNorm(96, ndim=3)
    with torch.no_grad():
        if lacking := fused_ops.missing_for_kernels(device):
            raise Skipped(f"needs {lacking}")
        expected = norm.modulated(x, shift, scale), activate(rms, conv, frames, {})
        rms.fused = True
        made = (
            fused_ops.norm_modulated(*(tensor.to(device) for tensor in (x, shift, scale)), norm.eps),
            activate(rms.to(device), conv.to(device), frames.to(device), {}),
        )
    worst = max(difference(mine.cpu(), other) for mine, other in zip(made, expected, strict=True))
    return within(worst, BOUNDS[torch.float32])


def check_mask(device: torch.device) -> str:
    """Compare block-causal attention (on CUDA with flex_attention) with the CPU."""
    mask = block_causal_mask(6, 3, window=4, sink=1)
    q, k, v = (random(1, 6 * 24, 2, 64, seed=seed) for seed in range(3))
    expected = attention(q, k, v, mask=mask)
    prepared = flex_mask(mask, 24, device) if device.type == "cuda" else mask
    return within(difference(attention(*(x.to(device) for x in (q, k, v)), mask=prepared).cpu(), expected), 1e-3)


def check_threads(device: torch.device) -> str:
    """Run the denoiser's kernel in one thread and the attention of the Wan VAE (one head of 384) in another."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backend = resolve_backend(AttentionBackend.auto, device, dtype)
    q = random(1, 256, 2, 128).to(device, dtype)
    frame = random(1, 1, 64, 384).to(device, dtype)
    errors: list[Exception] = []

    def repeat(work: Callable[[], object]) -> None:
        try:
            for _ in range(50):
                work()
        except Exception as error:
            errors.append(error)

    works = partial(run_kernel, backend, q, q, q), partial(F.scaled_dot_product_attention, frame, frame, frame)
    threads = [Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return f"{backend.value} beside torch's own"


def check_rollout(device: torch.device, dtype: torch.dtype) -> str:
    """Compare a clip with a rolling window with that of the CPU."""
    return within(difference(rolled_out(prepared_denoiser(device, dtype)), reference()), BOUNDS[dtype])


def check_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Compare the clip of compiled blocks with that of the CPU. They need few graphs, and none for the next clip."""
    require_compiler(device)
    denoiser = prepared_denoiser(device, dtype, compile=CompileMode.default)
    counters.clear()
    said = within(difference(rolled_out(denoiser), reference()), BOUNDS[dtype])
    graphs = counters["stats"]["unique_graphs"]
    rolled_out(denoiser)
    again = counters["stats"]["unique_graphs"] - graphs
    if graphs > GRAPHS or again or counters["graph_break"]:
        raise CheckFailed(f"{graphs} graphs (at most {GRAPHS}), {again} for the next clip, and graph breaks")
    return f"{said}, {graphs} graphs"


def check_session(device: torch.device, kind: str, dtype: torch.dtype) -> str:
    """Compare the pixels of a stream, which another thread decodes, with those of the CPU."""
    frames = streamed(device, kind, dtype)
    expected = streamed(torch.device("cpu"), kind, torch.float32)
    return within((frames - expected).abs().mean().item(), LEVELS[dtype], "mean difference in levels")


def streamed(device: torch.device, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the frames [F H W 3] of a session as float32."""
    pipeline = tiny_pipeline(prepared_denoiser(device, dtype), kind)
    return torch.cat([chunk.frames for chunk in StreamSession(pipeline, small_request("a prompt"))]).float()


def small_request(prompt: str) -> StreamRequest:
    """Return the request of a short stream."""
    return StreamRequest(prompt, 8 * LATENT[0], 8 * LATENT[1], num_frames=2 * RULES.frames_per_chunk)


def check_two_sessions(device: torch.device, mode: CompileMode) -> str:
    """Check that two streams that take turns make the same latents as each stream alone."""
    if mode is CompileMode.cudagraphs and device.type != "cuda":
        raise Skipped("needs a CUDA device")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline = tiny_pipeline(prepared_denoiser(device, dtype, compile=mode), "tiny")
    prompts = "a prompt", "another prompt"
    alone = [list(latents_of(pipeline, prompt)) for prompt in prompts]
    together = list(zip(*(latents_of(pipeline, prompt) for prompt in prompts), strict=True))
    worst = max(
        difference(mine, other)
        for made, single in zip(zip(*together, strict=True), alone, strict=True)
        for mine, other in zip(made, single, strict=True)
    )
    return within(worst, BOUNDS[dtype])


def latents_of(pipeline: TextToVideo, prompt: str) -> Iterator[torch.Tensor]:
    """Yield the latents of a session chunk by chunk, float32 on the CPU. Each chunk is made when it is asked for."""
    session = StreamSession(pipeline, small_request(prompt))
    return (block.latents.float().cpu() for block in iter(session.denoise, None))


def check_training(device: torch.device, compiled: bool) -> str:
    """Compare the losses before and after one training step with those of the CPU."""
    if compiled:
        require_compiler(device)
        if device.type != "cuda":
            raise Skipped("takes minutes on a CPU; tests/trainer/test_compiled.py counts its graphs")
    expected = training_losses(tiny_denoiser, torch.device("cpu"), compiled=False)
    made = training_losses(tiny_denoiser, device, compiled=compiled)
    return within(max(abs(a - b) / abs(b) for a, b in zip(made, expected, strict=True)), 0.02)


def require_compiler(device: torch.device) -> None:
    """Raise Skipped if torch.compile cannot make code for a device."""
    if compiler(device) is None:
        raise Skipped("needs triton" if device.type == "cuda" else "needs g++ or clang++")
