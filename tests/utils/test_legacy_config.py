"""For a YAML file of the official code, the program names the keys to write instead."""

from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import inference
import train
from trainer.config import Config
from utils.config import load_config
from utils.errors import UserError
from utils.legacy_config import IN_FILE, NO_KEY, OFFICIAL_KEYS

REPOSITORY = Path(__file__).resolve().parents[2]
# Key -> a value from the official configurations, for the keys whose value matters.
OFFICIAL_VALUES = {
    "real_name": "Wan2.1-T2V-14B",
    "fake_name": "Wan2.1-T2V-1.3B",
    "model_name": "Wan2.1-T2V-1.3B",
    "generator_name": "Wan2.1-T2V-14B",
    "trainer": "ode",
    "distribution_loss": "dmd",
    "distillation_loss": "ode",
    "teacher_forcing": True,
    "causal": False,
    "use_taehv": True,
    "adapter": {"type": "lora", "rank": 256, "alpha": 256},
    "denoising_step_list": [1000, 757, 522, 0],
    "guidance_scale": 3.0,
    "streaming_max_length": 240,
    "switch_choices": [21, 39, 201],
    "kv_cache_num_frames": 3,
    "lora_ckpt": "longlive_models/models/lora.pt",
    "ts_schedule": False,
    "ts_schedule_max": True,
    "global_sink": False,
    "do_kv_recomp": False,
    "use_ema": True,
    "ema_weight": 0.99,
    "model_kwargs.local_attn_size": 12,
    "relativistic_discriminator": True,
    "mixed_precision": True,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "num_frames": 81,
    "warp_denoising_step": True,
    "independent_first_frame": False,
    "gradient_checkpointing": True,
}


def new_keys(old: str) -> dict:
    value = OFFICIAL_VALUES.get(old, 1)
    return IN_FILE[old](value, {}) if old in IN_FILE else OFFICIAL_KEYS[old](value)


def answer(text: str, folder: Path) -> str:
    (folder / "old.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(Config, folder / "old.yaml")
    return str(caught.value)


def test_every_key_it_names_is_one_of_ours_and_takes_the_value(tmp_path):
    (tmp_path / "new.yaml").write_text("{}")
    new = {key: value for old in (*OFFICIAL_KEYS, *IN_FILE) for key, value in new_keys(old).items()}
    betas = {key: new.pop(key) for key in list(new) if key.endswith("]")}
    new |= {key.partition("[")[0]: [0.5, 0.5] for key in betas}
    assert len(betas) == 4
    load_config(Config, tmp_path / "new.yaml", [f"{key}={value}" for key, value in new.items()])


def test_values_that_mean_something_else_here_are_translated():
    assert new_keys("denoising_step_list") == {"rollout.denoising_steps": [1000, 757, 522]}
    assert new_keys("image_or_video_shape") == {"video.num_frames": 21, "video.height": 480, "video.width": 832}
    assert new_keys("num_frames") == {"video.num_frames": 21}
    assert OFFICIAL_KEYS["model_kwargs.local_attn_size"](-1) == {"rollout.window": None}
    assert new_keys("real_name")["real_score.weights"] == "wan_models/Wan2.1-T2V-14B"


@pytest.mark.parametrize(
    ("trainer", "key"),
    [
        ("score_distillation", "dmd.real_guidance_scale"),
        ("gan", "dmd.real_guidance_scale"),
        ("diffusion", "sampling.guidance_scale"),
        ("consistency_distillation", "consistency.guidance_scale"),
    ],
)
def test_guidance_scale_means_what_the_objective_of_the_file_reads(tmp_path, trainer, key):
    text = f"trainer: {trainer}\nguidance_scale: 3.0\n"
    assert f"  guidance_scale: {key}=3.0" in answer(text, tmp_path).split("\n")


def test_the_windows_and_switches_of_longlive_are_counted(tmp_path):
    """In longlive_train_long.yaml, 240 frames are 13 windows, and frame 201 is before the twelfth window."""
    text = "streaming_chunk_size: 21\nstreaming_min_new_frame: 18\nstreaming_max_length: 240\nglobal_sink: false\n"
    lines = answer(f"{text}switch_choices: [21, 39, 201]\n", tmp_path).split("\n")
    assert "  streaming_max_length: long.windows=13, long.overlap=3" in lines
    assert "  switch_choices: long.last_switch=11" in lines
    assert "  global_sink: rollout.recache_sink=true" in lines
    assert "  streaming_chunk_size: video.num_frames=21" in lines
    ours = load_config(Config, REPOSITORY / "configs" / "longlive.yaml")
    assert (ours.long.windows, ours.long.overlap, ours.long.last_switch, ours.video.num_frames) == (13, 3, 11, 21)


def test_a_clean_step_is_trained_on_without_backward_simulation_only(tmp_path):
    steps = "denoising_step_list: [1000, 757, 522, 0]\n"
    assert "dmd.clean_step" not in answer(steps, tmp_path)
    assert "dmd.clean_step=true" in answer(f"{steps}backward_simulation: false\n", tmp_path)


def test_an_old_file_is_answered_key_by_key_and_nothing_is_loaded(tmp_path):
    lines = answer(
        "generator_ckpt: checkpoints/ode_init.pt\ngenerator_fsdp_wrap_strategy: size\nlr: 2.0e-06\nbeta2: 0.999\n"
        "trainer: score_distillation\ndistribution_loss: sid\ni2v: false\nmodel_kwargs: {timestep_shift: 5.0}\n",
        tmp_path,
    ).split("\n")
    assert lines[0].startswith(f"{tmp_path}/old.yaml: has keys of the official code; nothing was loaded")
    assert lines[1:] == [
        "  generator_ckpt: student.weights=checkpoints/ode_init.pt",
        "  lr: optimizer.lr=2.0e-06",
        "  beta2: optimizer.betas[1]=0.999",
        "  distribution_loss: objective=self_forcing_sid",
        "  i2v: the option --i2v",
        "  model_kwargs.timestep_shift: generator.shift=5.0, student.shift=5.0",
        "  no key here: generator_fsdp_wrap_strategy, trainer",
    ]


@pytest.mark.parametrize(
    "text",
    ["image_or_video_shape: 3", "real_name: [1]", "real_name: Wan2.2", "denoising_step_list: {a: b}", "trainer: gnome"],
)
def test_a_value_that_makes_no_sense_is_shown(text, tmp_path):
    assert "is not a value that the official code accepts" in answer(text, tmp_path)


def test_long_values_are_cut(tmp_path):
    assert max(map(len, answer(f"negative_prompt: {'坏' * 500}", tmp_path).split("\n")[1:])) < 120


@pytest.mark.parametrize("defaults", ["defaults: [default_config, _self_]\n", ""])
def test_an_old_key_is_recognised_before_defaults_and_among_new_sections(tmp_path, defaults):
    assert "rollout.frames_per_chunk=1" in answer(f"{defaults}num_frame_per_block: 1\nvideo: {{fps: 16}}\n", tmp_path)


def test_keys_that_are_no_text_are_no_old_ones(tmp_path):
    assert "unknown key 3=" in answer("3: 4\n", tmp_path)


def test_an_old_key_on_the_command_line_is_recognised(tmp_path):
    (tmp_path / "new.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"command line: has keys .*\n  ema_weight: trainer.ema_decay=0.9$"):
        load_config(Config, tmp_path / "new.yaml", ["ema_weight=0.9"])


def test_no_key_of_ours_is_taken_for_an_old_one():
    ours = {field.name for field in fields(Config)}
    assert not ours & ((OFFICIAL_KEYS | IN_FILE).keys() - {"trainer"})
    assert not any(fnmatchcase(name, pattern) for name in ours for pattern in NO_KEY)


@pytest.mark.parametrize(("command", "options"), [(train, ["--logdir", "logs"]), (inference, [])])
def test_the_command_lines_answer_with_exit_code_2(tmp_path, monkeypatch, capsys, command, options):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("generator_ckpt: a.pt\nnum_frame_per_block: 3\n")
    assert command.main(["--config_path", "old.yaml", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: old.yaml: has keys of the official code")
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]
