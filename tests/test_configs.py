"""Every YAML file in configs/ loads, says what it is, and is consistent with itself and with related files."""

import functools
from pathlib import Path

import pytest

import inference
import train
from model.flow_matching import FlowMatching
from model.weights import not_found
from trainer.config import Config, Objective
from trainer.data import DataKind
from utils.config import load_config
from utils.errors import UserError
from utils.prompts import read_prompts

REPOSITORY = Path(__file__).resolve().parents[1]
WAN = sorted((REPOSITORY / "configs").glob("*.yaml"))
EVERY = sorted((REPOSITORY / "configs").rglob("*.yaml"))
PUBLISHED = {
    *("self_forcing_dmd", "self_forcing_sid", "self_forcing_gan", "causvid", "ode_init", "teacher_forcing"),
    *("diffusion_forcing", "self_forcing_dmd_framewise", "wan2.1", "self_forcing_14b", "longlive_init", "longlive"),
    *("self_forcing_10s", "causal_forcing_dmd", "causal_ode", "causal_consistency"),
}
DISTILLED = {
    *(Objective.self_forcing_dmd, Objective.self_forcing_sid, Objective.self_forcing_gan, Objective.causvid),
    *(Objective.self_forcing_long, Objective.self_forcing_continued),
}


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()


@pytest.fixture(params=WAN, ids=name)
def wan(request) -> Config:
    return configuration(request.param.stem)


@functools.cache
def configuration(which: str) -> Config:
    return load_config(Config, REPOSITORY / "configs" / f"{which}.yaml")


def test_every_published_configuration_is_there():
    assert {*PUBLISHED, "wan_base"} <= {path.stem for path in WAN}


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_it_opens_with_one_comment_line_that_says_what_it_is(path):
    first, second, *_ = path.read_text(encoding="utf-8").split("\n")
    assert first.startswith("# ")
    assert 30 <= len(first) <= 130
    if path in WAN:
        assert not second.startswith("#")
    if path in WAN and path.stem in PUBLISHED:
        assert "arXiv" in first or "/" in first, "names no paper or repository"


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_training_takes_it(path, tmp_path, capsys):
    assert train.main(["--config_path", str(path), "--logdir", str(tmp_path / "logs"), "--dry-run"]) == 0
    assert "objective: " in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("path", WAN, ids=name)
def test_inference_takes_it(path, capsys):
    assert inference.main(["--config_path", str(path), "--dry-run"]) == 0
    assert "output_folder: videos" in capsys.readouterr().out


def test_schedules_and_sizes_agree(wan):
    assert wan.rollout.chunks(wan.video.num_frames)
    assert wan.video.height % 16 == wan.video.width % 16 == 0
    assert wan.codec.weights.startswith("wan_models/Wan2.1-T2V-1.3B")
    assert wan.sampling.negative_prompt == configuration("wan_base").sampling.negative_prompt != ""
    if wan.objective is Objective.ode_regression:
        assert wan.generator.shift == wan.real_score.shift, "its steps are no points of the teacher's grid"
    if wan.objective in DISTILLED:
        assert wan.generator.shift == wan.student.shift == wan.real_score.shift == wan.fake_score.shift
        assert wan.generator.preset == wan.student.preset
        assert wan.student.gradient_checkpointing


def test_published_steps(wan):
    """The four steps of Self Forcing are warped by the schedule of the network that uses them."""
    if wan.objective is Objective.causvid:
        assert not wan.rollout.warp_denoising_step
        return
    assert wan.rollout.denoising_steps == [1000, 750, 500, 250]
    assert wan.rollout.warp_denoising_step
    if wan.objective in DISTILLED:
        warped = FlowMatching(wan.generator.shift).warp(wan.rollout.denoising_steps)
        assert [round(step, 3) for step in warped] == [1000, 937.5, 833.333, 625]


def test_ode_pairs_lie_on_the_steps_the_student_learns():
    """The teacher's grid and the student's warped steps have the same shift."""
    config = configuration("ode_init")
    warped = config.rollout.timesteps(_Schedule(config.generator.shift))
    grid = FlowMatching(config.real_score.shift).grid(48)
    assert [round(grid[index].item(), 3) for index in (0, 12, 24, 36)] == [round(step, 3) for step in warped]


class _Schedule:
    """The part of a denoiser that `RolloutConfig.timesteps` uses."""

    def __init__(self, shift: float):
        self.schedule = FlowMatching(shift)


def test_variants_differ_from_what_they_vary_in_what_their_name_says():
    dmd, sid, framewise = (configuration(f"self_forcing_{which}") for which in ("dmd", "sid", "dmd_framewise"))
    large, longlive = configuration("self_forcing_14b"), configuration("longlive_init")
    assert dmd.rollout.frames_per_chunk == 3
    assert framewise.rollout.frames_per_chunk == 1
    assert dmd.real_score.preset == large.student.preset == large.generator.preset == "wan2.1-t2v-14b"
    assert sid.real_score.preset == sid.fake_score.preset == dmd.fake_score.preset == "wan2.1-t2v-1.3b"
    for other in (framewise, large, longlive):
        assert (other.optimizer, other.critic_optimizer, other.dmd) == (dmd.optimizer, dmd.critic_optimizer, dmd.dmd)
        assert other.trainer.total_batch_size == dmd.trainer.total_batch_size == 64
    teacher, diffusion = configuration("teacher_forcing"), configuration("diffusion_forcing")
    assert teacher.diffusion.forcing.value == "teacher_forcing"
    assert diffusion.diffusion.forcing.value == "diffusion_forcing"
    assert teacher.optimizer == diffusion.optimizer


def test_their_prompts_are_long_and_all_different():
    prompts = read_prompts(REPOSITORY / configuration("wan_base").inference.data_path)
    assert len(prompts) >= 32
    assert min(len(prompt.split()) for prompt in prompts) >= 80
    assert len({" ".join(prompt.split()[:4]) for prompt in prompts}) == len(prompts)


def test_every_file_it_names_can_be_downloaded_or_is_made_by_another_configuration(wan):
    networks = (wan.generator, wan.student, wan.real_score, wan.fake_score)
    named = [network.weights for network in networks if network.weights] + [wan.codec.weights, wan.text_encoder.weights]
    for path in named:
        assert path.startswith("logs/") or "download it: hf download" in str(not_found(path)), path
    if wan.data.kind is DataKind.prompts:
        with pytest.raises(UserError, match=r"download it: hf download .* --local-dir prompts$"):
            read_prompts(wan.data.path)
