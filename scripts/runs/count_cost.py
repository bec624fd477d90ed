"""Counts the cost of full-size Self Forcing training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from model.transformer import PRESETS, WanConfig, WanTransformer
from pipeline.rollout import RolloutConfig
from pipeline.steps import most_steps
from utils.errors import UserError
from utils.files import atomic_write_text

PEAK_FLOPS = 989e12
"""Dense bf16 FLOPs per second of an H100 SXM (NVIDIA's data sheet)."""
LINK_BYTES = 450e9
"""Bytes per second over NVLink of an H100 in one direction."""
SPATIAL_SCALE = 8
"""Pixels per latent along height and width."""
HALF, FULL = 2, 4
"""Bytes of a bf16 number and of an fp32 number."""
GIB = 2**30


def run(args: argparse.Namespace, command: str) -> None:
    """Write the page and print it. `command` is the command line that makes it again.

    Raises:
        UserError: a preset does not exist.
    """
    for flag, presets in (("student", [args.student]), ("teachers", args.teachers)):
        if unknown := [preset for preset in presets if preset not in PRESETS]:
            raise UserError(f"--{flag}={unknown[0]} is not one of {', '.join(PRESETS)}")
    text = report(args, command)
    atomic_write_text(args.output, text)
    print(text)


@dataclass(frozen=True)
class ClipSize:
    """The size of a video in latents."""

    frames: int
    height: int
    width: int

    def tokens(self, config: WanConfig) -> int:
        """Return the number of tokens of one latent frame."""
        _, rows, columns = config.patch_size
        return (self.height // rows) * (self.width // columns)


def forward_flops(config: WanConfig, frames: int, frame_tokens: int, seen_frames: int, *, text: bool = True) -> float:
    """Return the FLOPs of one pass over one video.

    Args:
        frames: latent frames of the pass.
        seen_frames: latent frames that they attend to. Their own count too.
        text: whether the prompt's keys and values are computed too. With a cache this happens once in a rollout.
    """
    tokens, dim, length = frames * frame_tokens, config.dim, config.text_len
    prompt = 2 * length * (config.num_layers * 2 * dim**2 + config.text_dim * dim + dim**2) if text else 0
    time = 2 * frames * (config.freq_dim * dim + dim**2 + 6 * dim**2)
    patch_area = config.patch_size[1] * config.patch_size[2]
    ends = 2 * tokens * dim * patch_area * (config.in_dim + config.out_dim)
    return config.num_layers * block_flops(config, tokens, seen_frames * frame_tokens) + prompt + time + ends


def block_flops(config: WanConfig, tokens: int, seen_tokens: int) -> float:
    """Return the FLOPs of one block without the prompt's keys and values."""
    linear = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)  # attention 4, cross-attention 2, FFN 2
    return linear + 4 * tokens * config.dim * (seen_tokens + config.text_len)


def context_flops(config: WanConfig, frames: int, frame_tokens: int, seen_frames: int) -> float:
    """Return the FLOPs of a pass that only fills the cache. The last block stops at its queries, keys and values."""
    tokens = frames * frame_tokens
    left_out = block_flops(config, tokens, seen_frames * frame_tokens) - 6 * tokens * config.dim**2
    return forward_flops(config, frames, frame_tokens, seen_frames, text=False) - left_out


@dataclass(frozen=True)
class Work:
    """The FLOPs of one video for each phase. Backward recomputes the blocks, so it costs three forward passes."""

    rollout: float
    """Mean over the exit steps. Exit passes store the inputs of backward."""
    generator_backward: float
    real_score: float
    """The teacher with and without the prompt."""
    fake_score: float
    critic: float
    """Forward and backward pass of the critic."""

    @classmethod
    def count(cls, student: WanConfig, teacher: WanConfig, clip: ClipSize, config: RolloutConfig) -> Work:
        """Count the work of DMD. The text of a rollout counts in its exit passes, because their gradient needs it."""
        chunks = config.chunks(clip.frames)
        tokens = clip.tokens(student)
        bare = [forward_flops(student, end - start, tokens, end, text=False) for start, end in chunks]
        exits = [forward_flops(student, end - start, tokens, end) for start, end in chunks]
        commits = [context_flops(student, end - start, tokens, end) for start, end in chunks[:-1]]
        prompt = exits[0] - bare[0]
        early = (most_steps(config.denoising_steps) - 1) / 2  # passes before the exit, on average
        whole = forward_flops(student, clip.frames, tokens, clip.frames)
        guided = 2 * forward_flops(teacher, clip.frames, clip.tokens(teacher), clip.frames)
        return cls(
            rollout=early * sum(bare) + sum(exits) + sum(commits) + prompt,
            generator_backward=3 * sum(exits),
            real_score=guided,
            fake_score=whole,
            critic=4 * whole,
        )

    @property
    def generator_update(self) -> float:
        """Rollout, both scores and backward pass."""
        return self.rollout + self.real_score + self.fake_score + self.generator_backward

    def critic_update(self, *, fresh: bool) -> float:
        """Return the FLOPs of a critic update, which makes its own rollout (`fresh`) or replays an earlier one."""
        return self.critic + (self.rollout if fresh else 0.0)

    def step(self, critic_updates: int, *, fresh: bool) -> float:
        """Return the FLOPs of one generator update and its critic updates; see :meth:`critic_update` for `fresh`."""
        return self.generator_update + critic_updates * self.critic_update(fresh=fresh)


def parameters(config: WanConfig) -> int:
    """Return the number of parameters of a transformer."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanTransformer(config).parameters())


@dataclass(frozen=True)
class Memory:
    """The bytes on each GPU for one video at a time, if everything is sharded over all GPUs (FSDP2)."""

    states: float
    """Generator and critic in fp32 with gradients and AdamW's two moments, the generator's average, the teacher."""
    rollout: float
    """Keys and values of all frames, and the inputs of every block's exit passes."""
    scores: float
    """One block of the teacher for two videos, and the inputs that the rollout stores."""
    critic: float
    """The inputs of every block, and the activations of one block."""

    @classmethod
    def count(cls, student: WanConfig, teacher: WanConfig, clip: ClipSize, gpus: int) -> Memory:
        """Count the bytes by closed formulas, without the allocator's fragmentation and the weights of two blocks."""
        tokens = clip.frames * clip.tokens(student)
        of_student, of_teacher = parameters(student), parameters(teacher)
        states = ((4 + 4) * FULL * of_student + FULL * of_student + HALF * of_teacher) / gpus
        inputs = student.num_layers * tokens * student.dim * HALF
        return cls(
            states=states,
            rollout=inputs + 2 * student.num_layers * tokens * student.dim * HALF,
            scores=inputs + 2 * block_bytes(teacher, clip.frames * clip.tokens(teacher)),
            critic=inputs + block_bytes(student, tokens),
        )


def block_bytes(config: WanConfig, tokens: int) -> float:
    """Return the bytes that one block stores for backward: for each token about 12 model widths and 3 FFN widths."""
    return tokens * (12 * config.dim + 3 * config.ffn_dim) * HALF


def report(args: argparse.Namespace, command: str) -> str:
    """Return the text of the page."""
    rollout = RolloutConfig()
    clip = ClipSize(args.frames, args.height // SPATIAL_SCALE, args.width // SPATIAL_SCALE)
    student = PRESETS[args.student]
    works = {name: Work.count(student, PRESETS[name], clip, rollout) for name in args.teachers}
    parts = [
        "# What full-size training costs",
        f"Written by `{command}`. **Counted, not measured**: no GPU was used. Generator and critic are {args.student} "
        f"({parameters(student) / 1e9:.2f} billion parameters), videos {args.frames} latent frames of "
        f"{args.height}x{args.width}, {clip.frames * clip.tokens(student):,} tokens; "
        f"{most_steps(rollout.denoising_steps)} steps, chunks of {rollout.frames_per_chunk}, "
        "blocks recomputed in backward.",
        "## FLOPs of one video, by phase",
        _table(["phase, TFLOP", *args.teachers], _phase_rows(works)),
        f"## Hours for {args.iterations} iterations",
        f"{args.batch} videos an update, at a share of the {PEAK_FLOPS / 1e12:.0f} TFLOP/s that an H100 has in bf16. "
        "An iteration is the official code's: it trains the critic, and every "
        f"{args.critic_updates}th the generator too; {args.iterations} of them are "
        f"`trainer.steps={args.iterations // args.critic_updates}` here. Replay (`dmd.replay_rollouts`) lets critic "
        "updates use the generator's rollouts in place of new ones.",
        _table(
            ["critic's videos", "teacher", "GPUs", *(f"at {share:.0%}" for share in args.utilisation)],
            _hours(args, works),
        ),
        "## Memory of each GPU, one video at a time, GiB",
        _table(["teacher", "GPUs", "states", "+ rollout", "+ scores", "+ critic"], _memory_rows(args, student, clip)),
        "States: generator and critic in fp32 with gradients and AdamW, the generator's average, the teacher in bf16, "
        "all sharded over all GPUs; a phase adds its activations to them. Not counted: two gathered blocks, the VAE, "
        "the allocator's waste.",
        "## Traffic of each GPU, one video at a time",
        _table(["phase", *(f"{name}, GB" for name in args.teachers)], _traffic_rows(args, student, rollout, clip)),
        f"Weights are gathered in bf16 for every pass. At {LINK_BYTES / 1e9:.0f} GB/s (NVLink, one machine) "
        "100 GB take 0.22 s; several videos a pass share them.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _phase_rows(works: dict[str, Work]) -> list[list[str]]:
    phases = {
        "rollout (mean over exit steps)": lambda work: work.rollout,
        "real score, with and without prompt": lambda work: work.real_score,
        "fake score": lambda work: work.fake_score,
        "generator backward": lambda work: work.generator_backward,
        "critic forward and backward": lambda work: work.critic,
        "**generator update**": lambda work: work.generator_update,
        "**critic update**, own rollout": lambda work: work.critic_update(fresh=True),
        "**critic update**, replayed": lambda work: work.critic_update(fresh=False),
    }
    return [[name, *(f"{of(work) / 1e12:,.0f}" for work in works.values())] for name, of in phases.items()]


def _hours(args: argparse.Namespace, works: dict[str, Work]) -> list[list[str]]:
    rows = []
    for name, fresh in (("own rollouts", True), ("replayed", False)):
        for teacher, work in works.items():
            steps = args.iterations / args.critic_updates
            total = steps * args.batch * work.step(args.critic_updates, fresh=fresh)
            for gpus in args.gpus:
                hours = [total / (gpus * share * PEAK_FLOPS) / 3600 for share in args.utilisation]
                rows.append([name, teacher, str(gpus), *(f"{value:.1f} h" for value in hours)])
    return rows


def _memory_rows(args: argparse.Namespace, student: WanConfig, clip: ClipSize) -> list[list[str]]:
    rows = []
    for teacher in args.teachers:
        for gpus in args.gpus:
            memory = Memory.count(student, PRESETS[teacher], clip, gpus)
            phases = (memory.rollout, memory.scores, memory.critic)
            totals = [memory.states, *(memory.states + phase for phase in phases)]
            rows.append([teacher, str(gpus), *(f"{value / GIB:.1f}" for value in totals)])
    return rows


def _traffic_rows(
    args: argparse.Namespace, student: WanConfig, rollout: RolloutConfig, clip: ClipSize
) -> list[list[str]]:
    chunks, steps = len(rollout.chunks(clip.frames)), most_steps(rollout.denoising_steps)
    passes = {"rollout": chunks * (steps + 1) / 2 + chunks - 1, "generator backward": chunks, "critic": 2}
    rows = []
    for phase, count in passes.items():
        reduced = 0 if phase == "rollout" else FULL * parameters(student)  # gradients, in fp32
        rows.append([phase, *[f"{(HALF * count * parameters(student) + reduced) / 1e9:.0f}"] * len(args.teachers)])
    scores = [HALF * (parameters(student) + parameters(PRESETS[teacher])) for teacher in args.teachers]
    return [*rows, ["scores", *(f"{value / 1e9:.0f}" for value in scores)]]
