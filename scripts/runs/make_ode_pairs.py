"""Samples a teacher and stores points of each denoising trajectory, for ODE regression."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.attention import teacher_forcing_mask
from model.denoiser import Denoiser
from pipeline.loading import load_codec, load_denoiser
from pipeline.sampling import Solver, trajectory
from pipeline.steps import steps_of_chunk
from scripts.runs.shard_job import ShardJob, begin
from trainer.config import Config
from trainer.data import Contents, text_source, training_data
from trainer.objectives.consistency import causal_trajectory
from utils.distributed import share
from utils.errors import UserError
from utils.seeds import derive_seed
from utils.shards import ShardWriter
from utils.tracking import progress


def run(args: argparse.Namespace) -> None:
    """Make the trajectories that are not in the folder yet. Raises UserError if an input cannot be used."""
    job = begin(args, "ode.pairs", check=lambda config: check_counts(args, config))
    teacher = Teacher(args, job)
    with ShardWriter(job.folder, teacher.about(), shard_size=args.shard_size) as writer:
        items = writer.remaining(share(range(args.count), job.ranks.rank, job.ranks.world_size))
        starts = range(0, len(items), args.batch)
        for start in progress(starts, "trajectories", unit="batch", is_main=job.ranks.is_main):
            chosen = items[start : start + args.batch]
            prompts, tensors = teacher.solve(chosen)
            for row, (item, prompt) in enumerate(zip(chosen, prompts, strict=True)):
                writer.add(item, {"prompt": prompt}, {name: rows[row] for name, rows in tensors.items()})
    print(f"{job.folder}: {len(items)} trajectories of {len(teacher.kept)} states made")


def check_counts(args: argparse.Namespace, config: Config) -> None:
    """Raise UserError for counts that make no pair."""
    for name in ("count", "batch", "shard_size", "solver_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    kept_states(steps_of_chunk(config.rollout.denoising_steps, 0), args.solver_steps)


class Teacher:
    """The teacher with its prompts, videos and noise. Trajectory i depends only on the seed and on i."""

    def __init__(self, args: argparse.Namespace, job: ShardJob) -> None:
        """Load the models. Raises UserError if weights or data are missing or do not fit."""
        sampling = replace(job.config.sampling, steps=args.solver_steps, solver=Solver.euler)
        self.config = replace(job.config, sampling=sampling)
        self.device, self.dtype, self.causal = job.device, job.dtype, args.causal
        self.kept = kept_states(steps_of_chunk(self.config.rollout.denoising_steps, 0), args.solver_steps)
        self.denoiser = load_denoiser(self.config.real_score, device=self.device, dtype=self.dtype)
        self.text = text_source(self.config.data, self.config.text_encoder, self.device)
        self.codec = load_codec(self.config.codec, device=self.device)
        self.seed = derive_seed(self.config.trainer.seed, "ode pairs")
        contents = Contents.clips if self.causal else Contents.prompts
        video = self.config.video
        self.data = training_data(self.config.data, contents, seed=self.seed, video=video, codec=self.codec)
        self.trajectory = (causal_solver if self.causal else bidirectional_solver)(self.denoiser, self.config)
        self.shape = video.latent_shape(self.codec)

    def about(self) -> dict[str, Any]:
        """Return the common properties of all trajectories."""
        sampling = self.config.sampling
        timesteps = [*self.denoiser.schedule.grid(sampling.steps).tolist(), 0.0]
        return {
            "causal": self.causal,
            "timesteps": [timesteps[index] for index in self.kept],
            "seed": self.config.trainer.seed,
            "solver_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
        }

    def solve(self, items: Sequence[int]) -> tuple[list[str], dict[str, Tensor]]:
        """Return the prompts of trajectories and their states [B S F C H W], with the clean latents if causal."""
        samples = self.data.read(items)
        clean = samples.encode(self.codec, self.device) if self.causal else None
        seeds = [derive_seed(self.seed, "noise", item) for item in items]
        noise = torch.stack([draw_noise(self.shape, seed) for seed in seeds]).to(self.device)
        negative = self.text.encode([self.config.sampling.negative_prompt] * len(items))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            states = self.trajectory(noise, clean, self.text.encode(samples.prompts), negative)
        tensors = {"states": torch.stack([states[index] for index in self.kept], dim=1).half()}
        return samples.prompts, tensors if clean is None else {**tensors, "clean": clean.half()}


Solve = Callable[["Tensor", "Tensor | None", "Tensor", "Tensor"], "list[Tensor]"]
"""(noise, clean, prompt_embeds, negative_embeds) -> the states of the trajectory."""


def bidirectional_solver(teacher: Denoiser, config: Config) -> Solve:
    """Return the solver for trajectories of whole clips."""
    return lambda noise, clean, embeds, negative: trajectory(teacher, noise, embeds, negative, config.sampling)


def causal_solver(teacher: Denoiser, config: Config) -> Solve:
    """Return the solver for trajectories of chunks, each after the clean chunks before it."""
    config.rollout.chunks(config.video.num_frames)
    mask = config.rollout.mask(config.video.num_frames, teacher_forcing_mask)
    return lambda noise, clean, embeds, negative: causal_trajectory(
        teacher, noise, clean, embeds, negative, config.sampling, mask
    )


def draw_noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Draw the standard normal noise of one trajectory."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_states(denoising_steps: list[float], solver_steps: int) -> list[int]:
    """Return the indices of the states at the unwarped denoising steps, and of the clean end.

    Raises:
        UserError: a denoising step is not on the solver's grid.
    """
    indices = [(1 - step / 1000) * solver_steps for step in denoising_steps]
    if any(abs(index - round(index)) > 1e-6 for index in indices):
        raise UserError(f"--solver_steps={solver_steps}: rollout.denoising_steps={denoising_steps} are not on its grid")
    return [*(round(index) for index in indices), solver_steps]
