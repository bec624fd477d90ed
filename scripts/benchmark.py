"""Measure speed: every stage of inference, training, loading, the codec, and the floor of bare matrix products.

    python scripts/benchmark.py inference --config_path configs/shapes/self_forcing_dmd.yaml
    python scripts/benchmark.py inference --config_path configs/self_forcing_dmd.yaml --random-weights
    python scripts/benchmark.py all --output benchmark.json

Prints a table with the command that reproduces it; --output keeps it as JSON, --against compares with such a file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.codec import VideoCodec
    from model.denoiser import Denoiser
    from model.transformer import WanConfig
    from pipeline.config import PipelineConfig

ROOT = Path(__file__).resolve().parents[1]
FLOOR_SIZES = {"dim": 384, "ffn_dim": 1536, "num_heads": 6, "num_layers": 6, "text_dim": 64, "text_len": 32}
FLOOR_LATENT = (16, 24)
FLOOR_FRAMES = 21
PROMPT = "a large red circle moving right on a navy background"
EARLY_CHUNK, LATE_CHUNK = 20, 500
LONG_CHUNK = 6  # the one whose denoising published figures name
PEER_LATENTS = (5, 8, 12)  # frames, rows, columns: 17 frames of 64x96 pixels
Figures = dict[str, float]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*MEASURES, "all"])
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="default: %(default)s")
    add("--random-weights", action="store_true", help="full-size parts without files, and random text embeddings")
    add("--frames", type=int, help="latent frames a video; default: the configuration's")
    add("--repeats", type=int, default=5, help="videos, passes or steps measured; default: %(default)s")
    add("--threads", type=int, help="CPU threads of torch; default: torch's choice")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor time, for a busy machine and --threads 1; default: %(default)s",
    )
    add("--output", help="write the results to this JSON file")
    add("--against", help="print ratios to the results in this JSON file")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any key of the configuration, such as optimize.compile=default",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    args.command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from trainer.config import Config
    from utils.config import load_config
    from utils.distributed import resolve_device
    from utils.errors import UserError
    from utils.files import atomic_write_text

    if args.against and not Path(args.against).is_file():
        raise UserError(f"--against {args.against}: no such file; write one with --output")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    config = load_config(Config, args.config_path, args.overrides)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args, config, resolve_device(config.device))
    names = list(MEASURES) if args.what == "all" else [args.what]
    results = {name: MEASURES[name](bench) for name in names}
    report = {"command": args.command, "machine": machine(bench.device), "results": results}
    print_report(report, json.loads(Path(args.against).read_text()) if args.against else None)
    if args.output:
        atomic_write_text(args.output, json.dumps(report, indent=1) + "\n")


@dataclass
class Bench:
    """What every measurement is told."""

    args: argparse.Namespace
    config: PipelineConfig
    device: torch.device
    spans: dict[str, list[float]] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds, when everything queued is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.args.clock == "cpu" else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call."""
        start = self.now()
        work()
        return self.now() - start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keep how long something takes under its name."""
        start = self.now()
        yield
        self.spans.setdefault(name, []).append(self.now() - start)

    def stages(self) -> Figures:
        """Median and 90th percentile of every stage in milliseconds; forgets them."""
        import torch

        figures: Figures = {}
        for name, spans in self.spans.items():
            for percent in (50, 90):
                figures[f"{name} p{percent} ms"] = 1e3 * torch.tensor(spans).quantile(percent / 100).item()
        self.spans.clear()
        return figures

    @property
    def dtype(self) -> torch.dtype:
        from utils.distributed import resolve_dtype

        return resolve_dtype(self.config.dtype, self.device)

    def denoiser(self) -> Denoiser:
        """The generator, optimised as configured."""
        from pipeline.loading import load_denoiser
        from pipeline.optimize import optimize

        section = self.config.generator
        if self.args.random_weights:
            section = replace(section, weights=None, lora=None)
        denoiser = load_denoiser(section, use_ema=True, device=self.device, dtype=self.dtype)
        optimize(denoiser.transformer, self.config.optimize)
        return denoiser.eval()

    def codec(self) -> VideoCodec:
        """The video codec."""
        from pipeline.config import CodecKind
        from pipeline.loading import load_codec

        if not self.args.random_weights:
            return load_codec(self.config.codec, device=self.device, dtype=self.dtype)
        if self.config.codec.kind is CodecKind.wan:
            from model.wan_vae import WanAutoencoder, WanVAE, WanVAEConfig

            codec = WanVAE(WanAutoencoder(WanVAEConfig()))
        else:
            from model.tiny_vae import TinyVAE, TinyVAEConfig

            codec = TinyVAE(TinyVAEConfig())
        return codec.to(self.device, self.dtype).eval().requires_grad_(False)

    def text(self, sizes: WanConfig) -> Callable[[], Tensor]:
        """Embeds a prompt [1 L E], every time anew."""
        import torch

        from pipeline.loading import load_text_encoder

        if self.args.random_weights:
            embeds = torch.randn(1, sizes.text_len, sizes.text_dim).to(self.device, self.dtype)
            embeds[:, sizes.text_len // 4 :] = 0
            return embeds.clone
        encoder = load_text_encoder(self.config.text_encoder, device=self.device, dtype=self.dtype)
        return lambda: encoder.encode([PROMPT])


def measure_inference(bench: Bench) -> Figures:
    """Stages of making videos; the first frame and the rate include all of them, one after the other."""
    import torch

    from utils.tracking import peak_memory

    denoiser, codec = bench.denoiser(), bench.codec()
    embed = bench.text(denoiser.transformer.config)
    frames = bench.args.frames or bench.config.video.num_frames
    shape = (1, *bench.config.video.latent_shape(codec, frames))
    with torch.inference_mode():
        warm_up = bench.seconds(lambda: [make_video(bench, denoiser, codec, embed, shape) for _ in range(2)])
        bench.spans.clear()
        peak_memory(bench.device)
        videos = [make_video(bench, denoiser, codec, embed, shape) for _ in range(bench.args.repeats)]
    best = min(videos, key=lambda video: video["total"])
    figures = bench.stages() | {f"{name} s": best[name] for name in ("first frame", "denoise and context", "total")}
    pixel_frames = codec.num_frames(frames)
    return figures | {
        "frames/s": pixel_frames / best["total"],
        "frames/s without decode": pixel_frames / best["denoise and context"],
        "peak memory GB": peak_memory(bench.device),
        "warm-up s": warm_up,
    }


def make_video(bench: Bench, denoiser: Denoiser, codec: VideoCodec, embed: Callable[[], Tensor], shape) -> Figures:
    """One video, timed stage by stage; seconds of the first frame, of the denoiser and of all."""
    import torch

    from model.kv_cache import KVCache
    from pipeline.rollout import FinishedChunk, Stage, rollout_passes
    from utils.video import to_uint8

    begin, first, denoised, before = bench.now(), None, 0.0, 0.0
    with bench.stage("text"):
        embeds = embed()
    noise = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    steps, decoder = bench.config.rollout.timesteps(denoiser), codec.streaming_decoder()
    cache = KVCache(denoiser.transformer.config.num_layers)
    passes = rollout_passes(steps, noise, embeds, cache, bench.config.rollout)
    event, chunk = next(passes), 0
    while event is not None:
        if isinstance(event, FinishedChunk):
            chunk += 1
            if chunk == LONG_CHUNK:
                bench.spans.setdefault(f"steps of chunk {chunk}", []).append(denoised - before)
            with bench.stage("decode"):
                pixels = decoder.decode(event.latents)
            with bench.stage("host copy"):
                to_uint8(pixels[0]).cpu()
            first = first or bench.now() - begin
            event = next(passes, None)
            continue
        step = f"step {steps.index(event.timestep) + 1}" if event.stage is Stage.denoise else "context"
        with bench.stage(step):
            x0 = event.run(denoiser)
        denoised += bench.spans[step][-1]
        before = denoised if event.stage is Stage.context else before
        event = passes.send(x0)
    return {"first frame": first, "denoise and context": denoised, "total": bench.now() - begin}


@dataclass
class Embedder:
    """Stands in for a pipeline's text encoder."""

    embed: Callable[[], Tensor]

    def encode(self, prompts: list[str]) -> Tensor:
        """One prompt, every time anew."""
        return self.embed()


def measure_session(bench: Bench) -> Figures:
    """Streams as inference.py and the demo make them, decode beside denoising; by the wall's clock."""
    import torch

    from pipeline.request import StreamRequest
    from pipeline.session import StreamSession
    from pipeline.text_to_video import TextToVideo
    from utils.distributed import share_cores

    threads = torch.get_num_threads()
    if not bench.args.threads:
        share_cores(bench.device)
    denoiser, video = bench.denoiser(), bench.config.video
    embedder = Embedder(bench.text(denoiser.transformer.config))
    pipeline = TextToVideo(denoiser, embedder, bench.codec(), bench.config.rollout)
    frames = bench.args.frames or video.num_frames
    rates, firsts = [], []
    for _ in range(bench.args.repeats + 1):
        request = StreamRequest(PROMPT, video.height, video.width, num_frames=frames)
        begin = time.perf_counter()
        arrivals = [(time.perf_counter() - begin, len(chunk.frames)) for chunk in StreamSession(pipeline, request)]
        firsts.append(arrivals[0][0])
        rates.append(sum(count for _, count in arrivals) / arrivals[-1][0])
    torch.set_num_threads(threads)
    rates, firsts = torch.tensor(rates[1:]), torch.tensor(firsts[1:])
    return {
        "frames/s p50": rates.median().item(),
        "frames/s best": rates.max().item(),
        "first chunk p50 ms": 1e3 * firsts.median().item(),
        "first chunk best ms": 1e3 * firsts.min().item(),
    }


def measure_endless(bench: Bench) -> Figures:
    """Chunks late in a stream over early ones, the window being full in both; two streams take turns."""
    import torch

    from model.kv_cache import KVCache
    from pipeline.rollout import rollout

    denoiser, codec = bench.denoiser(), bench.codec()
    rules = bench.config.rollout if bench.config.rollout.window else replace(bench.config.rollout, window=9)
    shape = (1, *bench.config.video.latent_shape(codec, rules.frames_per_chunk))
    noise = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    embeds = bench.text(denoiser.transformer.config)()
    with torch.inference_mode():
        young, old = (
            rollout(denoiser, repeat(noise), embeds, KVCache(denoiser.transformer.config.num_layers), rules)
            for _ in range(2)
        )
        for stream, chunks in ((young, EARLY_CHUNK), (old, LATE_CHUNK)):
            for _ in range(chunks - bench.args.repeats // 2):
                next(stream)
        early, late = in_turn(bench, partial(next, young), partial(next, old))
    return {f"chunk {EARLY_CHUNK} ms": 1e3 * early, f"chunk {LATE_CHUNK} ms": 1e3 * late, "late / early": late / early}


def measure_floor(bench: Bench) -> Figures:
    """A cached rollout over the bare matrix products and attention of its shapes, pass by pass in turn."""
    import torch

    from model.kv_cache import KVCache
    from model.transformer import WanConfig, WanTransformer
    from pipeline.optimize import optimize

    sizes = WanConfig(**FLOOR_SIZES)
    transformer = WanTransformer(sizes).to(bench.device, bench.dtype)
    optimize(transformer, bench.config.optimize)
    size, steps = bench.config.rollout.frames_per_chunk, len(bench.config.rollout.denoising_steps)
    latents, embeds = floor_inputs(sizes, size, transformer.head.head.bias)
    forward = partial(transformer, latents, torch.full((1, 1), 500.0, device=bench.device), embeds)
    cache = KVCache(sizes.num_layers)
    cache.reset(FLOOR_FRAMES)
    ours = floor = 0.0
    with torch.inference_mode():
        for start in range(0, FLOOR_FRAMES, size):
            options = {"cache": cache, "start_frame": start}
            commits = start + size < FLOOR_FRAMES
            denoised, committed, products = in_turn(
                bench,
                partial(forward, **options),
                partial(forward, **options, output_frames=0),
                bare_pass(sizes, size, start + size, latents),
            )
            ours += steps * denoised + commits * committed
            floor += (steps + commits) * products
    return {"rollout s": ours, "bare products s": floor, "rollout / bare products": ours / floor}


def in_turn(bench: Bench, *works: Callable[[], object]) -> list[float]:
    """Seconds of each work, the least of several rounds over all of them; the first round only warms up."""
    times = [[bench.seconds(work) for work in works] for _ in range(bench.args.repeats + 1)]
    return [min(column) for column in zip(*times[1:], strict=True)]


def floor_inputs(sizes: WanConfig, frames: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [1 F C H W] and prompt embeddings [1 L E] of the sizes used to compare."""
    import torch

    return (
        torch.randn(1, frames, sizes.in_dim, *FLOOR_LATENT).to(like),
        torch.randn(1, sizes.text_len, sizes.text_dim).to(like),
    )


def bare_pass(sizes: WanConfig, frames: int, seen_frames: int, like: Tensor) -> Callable[[], None]:
    """The matrix products and attention of one pass over a chunk, and nothing else."""
    import torch
    import torch.nn.functional as F

    height, width = (side // patch for side, patch in zip(FLOOR_LATENT, sizes.patch_size[1:], strict=True))
    tokens, dim, heads = height * width, sizes.dim, sizes.num_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(like)

    x, hidden = random(frames * tokens, dim), random(frames * tokens, sizes.ffn_dim)
    qkv, square, wide, narrow = (
        random(3 * dim, dim),
        random(dim, dim),
        random(sizes.ffn_dim, dim),
        random(dim, sizes.ffn_dim),
    )
    q, k, v, text = (
        random(1, heads, length, dim // heads)
        for length in (frames * tokens, seen_frames * tokens, seen_frames * tokens, sizes.text_len)
    )

    def products() -> None:
        for _ in range(sizes.num_layers):
            F.linear(x, qkv, qkv[:, 0])
            F.scaled_dot_product_attention(q, k, v)
            for _ in range(3):  # out of self-attention, into and out of cross-attention
                F.linear(x, square, square[0])
            F.scaled_dot_product_attention(q, text, text)
            F.linear(x, wide, wide[:, 0])
            F.linear(hidden, narrow, narrow[:, 0])

    return products


def measure_peer(bench: Bench) -> Figures:
    """Our bidirectional forward over that of diffusers, same weights and shapes, in turn."""
    import torch
    from diffusers import WanTransformer3DModel

    from model.transformer import WanConfig, WanTransformer
    from model.weights import wan_to_diffusers
    from pipeline.optimize import optimize

    sizes = WanConfig(**FLOOR_SIZES)
    ours = WanTransformer(sizes)
    ours.reset_parameters(torch.Generator().manual_seed(0))
    theirs = WanTransformer3DModel(
        patch_size=tuple(sizes.patch_size),
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.dim // sizes.num_heads,
        in_channels=sizes.in_dim,
        out_channels=sizes.out_dim,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=sizes.eps,
    )
    theirs.load_state_dict(wan_to_diffusers(ours.state_dict()))
    ours, theirs = (model.to(bench.device, bench.dtype).eval() for model in (ours, theirs))
    optimize(ours, bench.config.optimize)
    latents, embeds = floor_inputs(sizes, FLOOR_FRAMES, ours.head.head.bias)
    clip, timestep = latents.transpose(1, 2).contiguous(), torch.full((1,), 500.0, device=bench.device)
    with torch.inference_mode():
        mine, others = in_turn(
            bench,
            partial(ours, latents, timestep[:, None], embeds),
            partial(theirs, clip, timestep, embeds, return_dict=False),
        )
    return {"ours s": mine, "diffusers s": others, "ours / diffusers": mine / others}


def measure_codec(bench: Bench) -> Figures:
    """Decoding a clip as a stream, chunk by chunk, and encoding it."""
    import torch

    from utils.tracking import peak_memory

    codec, rules = bench.codec(), bench.config.rollout
    frames = bench.args.frames or bench.config.video.num_frames
    latents = torch.randn((1, *bench.config.video.latent_shape(codec, frames)), device=bench.device, dtype=bench.dtype)

    def decode() -> None:
        decoder = codec.streaming_decoder()
        for chunk in latents.split(rules.frames_per_chunk, dim=1):
            decoder.decode(chunk)

    with torch.inference_mode():
        warm_up = bench.seconds(decode)
        peak_memory(bench.device)
        decoding, encoding = in_turn(bench, decode, partial(codec.encode, codec.decode(latents)))
    pixel_frames = codec.num_frames(frames)
    return {
        "decode s": decoding,
        "decoded frames/s": pixel_frames / decoding,
        "encode s": encoding,
        "peak memory GB": peak_memory(bench.device),
        "warm-up s": warm_up,
    }


def measure_codec_peer(bench: Bench) -> Figures:
    """Our streaming Wan VAE decode over diffusers' whole decode, same weights and latents, in turn."""
    import torch
    from diffusers import AutoencoderKLWan

    from model.wan_vae import WanAutoencoder, WanVAE, WanVAEConfig

    theirs = AutoencoderKLWan().eval()
    network = WanAutoencoder(WanVAEConfig())
    network.load_state_dict(theirs.state_dict())
    theirs, ours = (model.to(bench.device, bench.dtype) for model in (theirs, WanVAE(network)))
    frames, rows, columns = PEER_LATENTS
    latents = torch.randn(1, frames, ours.latent_channels, rows, columns, device=bench.device, dtype=bench.dtype)
    mean, std = (torch.tensor(theirs.config[key]).view(-1, 1, 1).to(latents) for key in ("latents_mean", "latents_std"))
    raw = (latents * std + mean).transpose(1, 2)

    def stream() -> None:
        decoder = ours.streaming_decoder()
        for chunk in latents.split([1, *[2] * ((frames - 1) // 2)], dim=1):
            decoder.decode(chunk)

    with torch.inference_mode():
        mine, others = in_turn(bench, stream, partial(theirs.decode, raw, return_dict=False))
    return {"ours s": mine, "diffusers s": others, "ours / diffusers": mine / others}


LOADING = """
import sys, time
start = time.perf_counter()
from scripts import benchmark
from trainer.config import Config
from utils.config import load_config
from utils.distributed import resolve_device
args = benchmark.parse_arguments(sys.argv[1:])
config = load_config(Config, args.config_path, args.overrides)
bench = benchmark.Bench(args, config, resolve_device(config.device))
imported = time.perf_counter()
denoiser, codec = bench.denoiser(), bench.codec()
bench.text(denoiser.transformer.config)()
print(imported - start, time.perf_counter() - start)
"""


def measure_load(bench: Bench) -> Figures:
    """From the start of a process: help, and the parts ready; by the wall's clock."""
    args = bench.args
    flags = ["load", "--config_path", args.config_path, *["--random-weights"] * args.random_weights, *args.overrides]
    helps, imports, ready = [], [], []
    for _ in range(min(args.repeats, 3)):
        helps.append(-time.perf_counter())
        subprocess.run([sys.executable, "inference.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        helps[-1] += time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", LOADING, *flags], cwd=ROOT, check=True, capture_output=True, text=True
        )
        imported, done = map(float, out.stdout.split()[-2:])
        imports.append(imported)
        ready.append(done)
    return {"inference.py --help s": min(helps), "imports s": min(imports), "imports, parts and a prompt s": min(ready)}


def measure_train(bench: Bench) -> Figures:
    """Steps of train.py, phase by phase, after the first."""
    args, figures = bench.args, {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--config_path",
            args.config_path,
            "--logdir",
            folder,
            "--disable-wandb",
            "--no_save",
            "--no_visualize",
        ]
        steps = args.repeats + 1
        command = [sys.executable, "train.py", *flags, *args.overrides, f"trainer.steps={steps}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line][1:]
    for name in sorted(
        {key for line in steps for key in line if key.startswith("seconds") or key == "samples_per_second"}
    ):
        values = sorted(line[name] for line in steps if name in line)
        figures[f"{name} p50"] = values[len(values) // 2]
    return figures | {"memory_gb": max(line["memory_gb"] for line in steps)}


MEASURES: dict[str, Callable[[Bench], Figures]] = {
    "inference": measure_inference,
    "session": measure_session,
    "endless": measure_endless,
    "floor": measure_floor,
    "peer": measure_peer,
    "codec": measure_codec,
    "codec_peer": measure_codec_peer,
    "load": measure_load,
    "train": measure_train,
}


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on beside the command."""
    import torch

    on_gpu = device.type == "cuda"
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": revision.stdout.strip(),
    }


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def print_report(report: dict, against: dict | None) -> None:
    """A table of every figure, with its ratio to an earlier one."""
    print(f"$ {report['command']}")
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    if against:
        print(f"ratios to: {against['command']} ({against['machine']['device']}, torch {against['machine']['torch']})")
    for name, figures in report["results"].items():
        earlier = against["results"].get(name, {}) if against else {}
        print(f"\n{name}")
        for figure, value in figures.items():
            ratio = f"  {value / earlier[figure]:8.3f} x" if earlier.get(figure) else ""
            print(f"  {figure:32} {value:12.4g}{ratio}")


if __name__ == "__main__":
    sys.exit(main())
