"""Sample a teacher and keep points of each trajectory in the folder ode.pairs, for ODE regression.

With --causal the teacher is a causal one (teacher forcing), and every chunk is solved after the clean chunks before it,
of real videos, which are kept too. Run it again to go on after an interruption, or with a larger --count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.denoiser import Denoiser
    from trainer.config import Config


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/ode_regression.yaml")
    add("--causal", action="store_true", help="trajectories of a causal teacher after clean context")
    add("--count", type=int, default=512, help="trajectories")
    add("--batch", type=int, default=16)
    add("--shard_size", type=int, default=32, help="trajectories a file; an interruption loses at most as many")
    add("--solver_steps", type=int, default=48, help="Euler steps; rollout.denoising_steps must lie on their grid")
    add("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from pipeline.loading import load_codec, load_denoiser
    from pipeline.sampling import Solver
    from trainer.config import Config
    from trainer.data import Contents, text_source, training_data
    from utils.config import load_config
    from utils.distributed import derive_seed, init_distributed, resolve_device, resolve_dtype, share
    from utils.shards import ShardWriter
    from utils.tracking import progress

    config = load_config(Config, args.config_path, args.overrides)
    check_counts(args)
    kept = kept_states(config.rollout.denoising_steps, args.solver_steps)
    config.sampling.steps, config.sampling.solver = args.solver_steps, Solver.euler
    device = resolve_device(config.device)
    ranks = init_distributed(device.type)
    dtype = resolve_dtype(config.dtype, device)
    teacher = load_denoiser(config.real_score, device=device, dtype=dtype)
    text = text_source(config.data, config.text_encoder, device)
    codec = load_codec(config.codec, device=device)
    seed = derive_seed(config.trainer.seed, "ode pairs")
    contents, solver = (Contents.clips, causal_solver) if args.causal else (Contents.prompts, bidirectional_solver)
    data = training_data(config.data, contents, seed=seed, video=config.video, codec=codec)
    solve = solver(teacher, config)
    timesteps = [*teacher.schedule.grid(args.solver_steps).tolist(), 0.0]
    about = {
        "causal": args.causal,
        "timesteps": [timesteps[index] for index in kept],
        "seed": config.trainer.seed,
        "solver_steps": args.solver_steps,
        "guidance_scale": config.sampling.guidance_scale,
    }
    shape = config.video.latent_shape(codec)
    with ShardWriter(config.ode.pairs, about, shard_size=args.shard_size) as writer:
        items = writer.remaining(share(range(args.count), ranks.rank, ranks.world_size))
        for start in progress(range(0, len(items), args.batch), "trajectories", unit="batch", is_main=ranks.is_main):
            chosen = items[start : start + args.batch]
            samples = data.read(chosen)
            clean = samples.encode(codec, device) if args.causal else None
            noise = torch.stack([draw_noise(shape, derive_seed(seed, "noise", item)) for item in chosen]).to(device)
            negative = text.encode([config.sampling.negative_prompt] * len(chosen))
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                states = solve(noise, clean, text.encode(samples.prompts), negative)
            tensors = {"states": torch.stack([states[index] for index in kept], dim=1).half()}
            tensors |= {"clean": clean.half()} if args.causal else {}
            for row, (item, prompt) in enumerate(zip(chosen, samples.prompts, strict=True)):
                writer.add(item, {"prompt": prompt}, {name: rows[row] for name, rows in tensors.items()})
    print(f"{len(items)} trajectories of {len(kept)} states made, in {config.ode.pairs}")


def check_counts(args: argparse.Namespace) -> None:
    """Refuse what makes no pair."""
    from utils.errors import UserError

    for name in ("count", "batch", "shard_size", "solver_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")


Solve = Callable[["Tensor", "Tensor | None", "Tensor", "Tensor"], "list[Tensor]"]
"""(noise, clean, prompt_embeds, negative_embeds) -> the states of the trajectory."""


def bidirectional_solver(teacher: Denoiser, config: Config) -> Solve:
    """Trajectories of whole clips."""
    from pipeline.sampling import trajectory

    return lambda noise, clean, embeds, negative: trajectory(teacher, noise, embeds, negative, config.sampling)


def causal_solver(teacher: Denoiser, config: Config) -> Solve:
    """Trajectories of chunks, each after the clean ones before it."""
    from model.attention import teacher_forcing_mask
    from trainer.objectives.consistency import causal_trajectory

    config.rollout.chunks(config.video.num_frames)
    mask = config.rollout.mask(config.video.num_frames, teacher_forcing_mask)
    return lambda noise, clean, embeds, negative: causal_trajectory(
        teacher, noise, clean, embeds, negative, config.sampling, mask
    )


def draw_noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal numbers of one trajectory."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_states(denoising_steps: list[float], solver_steps: int) -> list[int]:
    """Indices of the states at the unwarped denoising steps, and of the clean end."""
    from utils.errors import UserError

    indices = [(1 - step / 1000) * solver_steps for step in denoising_steps]
    if any(abs(index - round(index)) > 1e-6 for index in indices):
        raise UserError(f"--solver_steps={solver_steps}: rollout.denoising_steps={denoising_steps} are not on its grid")
    return [*(round(index) for index in indices), solver_steps]


if __name__ == "__main__":
    sys.exit(main())
