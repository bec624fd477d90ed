"""Sample a teacher and keep points of each trajectory, for ODE regression."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/ode_regression.yaml")
    add("--count", type=int, default=512, help="trajectories")
    add("--batch", type=int, default=16)
    add("--solver_steps", type=int, default=48, help="Euler steps; rollout.denoising_steps must lie on their grid")
    add("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    import torch

    from model.text_encoder import PromptCache
    from pipeline.loading import load_codec, load_denoiser, load_text_encoder
    from pipeline.sampling import Solver, trajectory
    from trainer.config import Config
    from trainer.data import ODEPairs, training_prompts, write_ode_pairs
    from utils.config import load_config
    from utils.distributed import derive_seed, resolve_device
    from utils.errors import UserError
    from utils.tracking import progress

    config = load_config(Config, args.config_path, args.overrides)
    for name in ("count", "batch", "solver_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    kept = kept_states(config.rollout.denoising_steps, args.solver_steps)
    config.sampling.steps, config.sampling.solver = args.solver_steps, Solver.euler
    device = resolve_device(config.device)
    teacher = load_denoiser(config.real_score, device=device)
    encoder = PromptCache(load_text_encoder(config.text_encoder, device=device), 4096)
    codec = load_codec(config.codec)
    generator = torch.Generator().manual_seed(derive_seed(config.trainer.seed, "ode pairs"))
    deck = training_prompts(config.data, generator)
    prompts, chosen = [], []
    for start in progress(range(0, args.count, args.batch), "trajectories", unit="batch"):
        batch = deck.next(min(args.batch, args.count - start))
        noise = torch.randn(len(batch), *config.video.latent_shape(codec), generator=generator)
        negative = encoder.encode([config.sampling.negative_prompt] * len(batch))
        states = trajectory(teacher, noise.to(device), encoder.encode(batch), negative, config.sampling)
        chosen.append(torch.stack([states[index] for index in kept], dim=1).half().cpu())
        prompts += batch
    timesteps = [*teacher.schedule.grid(args.solver_steps).tolist(), 0.0]
    pairs = ODEPairs(torch.cat(chosen), [timesteps[index] for index in kept], prompts)
    write_ode_pairs(config.ode.pairs, pairs)
    print(f"{len(prompts)} trajectories of {len(kept)} states in {config.ode.pairs}")


def kept_states(denoising_steps: list[float], solver_steps: int) -> list[int]:
    """Indices of the states at the unwarped denoising steps, and of the clean end."""
    from utils.errors import UserError

    indices = [(1 - step / 1000) * solver_steps for step in denoising_steps]
    if any(abs(index - round(index)) > 1e-6 for index in indices):
        raise UserError(f"--solver_steps={solver_steps}: rollout.denoising_steps={denoising_steps} are not on its grid")
    return [*(round(index) for index in indices), solver_steps]


if __name__ == "__main__":
    sys.exit(main())
