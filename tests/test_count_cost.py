"""The cost formulas agree with torch's FLOP counter over the project's own rollout, losses and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.kv_cache import KVCache
from model.transformer import PRESETS, WanConfig, WanTransformer
from pipeline.rollout import RolloutConfig, rollout
from scripts import count_cost
from scripts.runs.count_cost import ClipSize, Work
from trainer.objectives.dmd import critic_loss, guided_x0

STUDENT = WanConfig(dim=192, ffn_dim=1120, num_heads=3, num_layers=2, text_dim=128, text_len=16)
TEACHER = WanConfig(dim=256, ffn_dim=640, num_heads=2, num_layers=1, text_dim=128, text_len=16)
CLIP = ClipSize(6, 16, 24)


def denoiser(config: WanConfig) -> Denoiser:
    transformer = WanTransformer(config)
    transformer.gradient_checkpointing = True
    return Denoiser(transformer, FlowMatching(5.0))


def counted(call) -> float:
    """Return the FLOPs of a call. Attention runs as matrix products, because torch does not count fused kernels."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return float(counter.get_total_flops())


def count_rollout(config: RolloutConfig, video: torch.Tensor, embeds: torch.Tensor, exit_step: int) -> list[float]:
    student, videos = denoiser(STUDENT), []
    exits = [exit_step] * len(config.chunks(CLIP.frames))
    cache = KVCache(STUDENT.num_layers, append_only=True)

    def forward() -> None:
        blocks = rollout(student, video, embeds, cache, config, exit_steps=exits, grad_start_frame=0)
        videos.append(torch.cat([block.latents for block in blocks], dim=1))

    return [counted(forward), counted(lambda: videos[0].sum().backward())]


def test_the_formulas_count_what_torch_counts():
    video = torch.randn(1, CLIP.frames, 16, CLIP.height, CLIP.width)
    embeds = torch.randn(1, STUDENT.text_len, STUDENT.text_dim)
    config, levels = RolloutConfig(denoising_steps=[1000.0, 500.0]), torch.full((1, CLIP.frames), 500.0)
    each = [count_rollout(config, video, embeds, exit_step) for exit_step in (0, 1)]
    critic, teacher = denoiser(STUDENT), denoiser(TEACHER)

    def learn() -> None:
        critic_loss(video, critic, embeds, timesteps=levels[:, :1], noise=video).backward()

    work = Work.count(STUDENT, TEACHER, CLIP, config)
    with torch.no_grad():
        fake = counted(lambda: critic(video, levels, embeds))
        real = counted(lambda: guided_x0(teacher, video, levels, embeds, embeds, 3.0))
    assert work.fake_score == pytest.approx(fake, rel=0.005)
    assert work.real_score == pytest.approx(real, rel=0.005)
    assert work.critic == pytest.approx(counted(learn), rel=0.01)
    assert work.rollout == pytest.approx(sum(forward for forward, _ in each) / 2, rel=0.01)
    assert work.generator_backward == pytest.approx(sum(backward for _, backward in each) / 2, rel=0.03)


def test_the_page_is_written_by_the_command_it_names(tmp_path, capsys):
    output = tmp_path / "cost.md"
    assert count_cost.main(["--output", str(output), "--gpus", "8", "--utilisation", "0.4"]) == 0
    text = output.read_text()
    assert f"python scripts/count_cost.py --output {output} --gpus 8 --utilisation 0.4" in text
    assert text.strip() == capsys.readouterr().out.strip()
    clip = ClipSize(21, 60, 104)
    work = Work.count(PRESETS["wan2.1-t2v-1.3b"], PRESETS["wan2.1-t2v-14b"], clip, RolloutConfig())
    assert f"| {work.generator_update / 1e12:,.0f} |" in text
    hours = 600 * 64 * work.step(5, fresh=True) / 5 / (8 * 0.4 * 989e12) / 3600
    assert f"| own rollouts | wan2.1-t2v-14b | 8 | {hours:.1f} h |" in text
    assert count_cost.main(["--gpus", "7"]) == 2
