"""evaluate.py measures and saves a table; make_ode_pairs.py stores the states from which a student learns."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.flow_matching import FlowMatching
from pipeline.loading import load_denoiser, load_text_encoder
from pipeline.sampling import SamplingConfig, Solver, trajectory
from scripts import evaluate, export, make_ode_pairs, repeat
from scripts.runs import shapes_table
from scripts.runs.make_ode_pairs import kept_states
from tests.shapes_parts import CODEC
from trainer.draws import Draw
from trainer.stored_data import ODEData
from utils.errors import UserError
from utils.shapes import training_scenes

pytest_plugins = ["tests.shapes_parts"]

STEPS = [1000.0, 750.0, 500.0, 250.0]


@pytest.fixture
def measure(release, tmp_path):
    """Give a function that runs evaluate.py on a part of the release and returns the output folder."""

    def measure(part: str, *arguments: str, folder: str = "table") -> Path:
        flags = ["--config_path", release.config_path, "--output_folder", str(tmp_path / folder)]
        assert evaluate.main([*flags, "--checkpoint", str(release.folder / part), "--prompts", "4", *arguments]) == 0
        return tmp_path / folder

    return measure


def test_evaluate_saves_and_prints_a_table_with_counts_and_seed(measure, capsys):
    folder = measure("generator", "--lengths", "1", "2", "--seed", "5", "--batch", "3")
    report = json.loads((folder / "table.json").read_text())
    assert (report["prompts"], report["seed"], report["sampler"]) == (4, 5, "rollout")
    assert report["tables"].keys() == {"1x", "2x"}
    for length, frames in (("1x", 21), ("2x", 45)):
        table = report["tables"][length]
        assert (table["clips"], table["frames"]) == (4, 4 * frames)
        assert all(0 <= table[name] <= 1 for name in shapes_table.COLUMNS)
        with Image.open(folder / f"contact_sheet_{length}.png") as sheet:
            assert sheet.height > 4 * 144
    printed = capsys.readouterr().out
    assert "4 held-out prompts, seed 5" in printed
    for length, table in report["tables"].items():
        (row,) = (line.split() for line in printed.splitlines() if line.split()[0] == length)
        assert row[1:] == [str(table["frames"]), *(f"{table[name]:.3f}" for name in shapes_table.COLUMNS)]


def test_the_same_evaluation_gives_the_same_table(measure):
    tables = []
    for run in ("first", "second"):
        (table,) = json.loads((measure("generator", "--lengths", "1", folder=run) / "table.json").read_text())[
            "tables"
        ].values()
        del table["generation_seconds"]
        tables.append(table)
    assert tables[0] == tables[1]


def test_evaluate_measures_a_teacher_by_its_own_sampler(measure):
    report = json.loads((measure("teacher", "--sampler", "teacher") / "table.json").read_text())
    assert report["sampler"] == "teacher" and report["tables"].keys() == {"1x"}
    assert report["tables"]["1x"]["frames"] == 4 * 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such file"),
        (["--checkpoint", "nowhere", "rollout.windw=9"], "did you mean rollout.window?"),
        (["--checkpoint", "nowhere", "--prompts", "0"], "--prompts=0 must be from 1 to 96"),
        (["--checkpoint", "nowhere", "--prompts", "97"], "--prompts=97"),
        (["--checkpoint", "nowhere", "--lengths", "1", "0"], "--lengths=0"),
        (["--checkpoint", "nowhere", "--batch", "0"], "--batch=0"),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_line(release, tmp_path, capsys, arguments, message):
    flags = ["--config_path", release.config_path, "--output_folder", str(tmp_path / "table")]
    assert evaluate.main([*flags, *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_the_kept_states_lie_on_the_warped_denoising_steps():
    assert kept_states(STEPS, 48) == [0, 12, 24, 36, 48]
    schedule = FlowMatching(5.0)
    assert schedule.grid(48)[kept_states(STEPS, 48)[:-1]].tolist() == pytest.approx(schedule.warp(STEPS), rel=1e-6)
    with pytest.raises(UserError, match="--solver_steps=10"):
        kept_states(STEPS, 10)


def test_pairs_are_states_of_the_teachers_trajectories(release, tmp_path):
    flags = ["--config_path", release.config_path, "--count", "3", "--batch", "2"]
    assert make_ode_pairs.main([*flags, f"ode.pairs={tmp_path}"]) == 0
    data = ODEData(tmp_path)
    pairs = data.samples([Draw(item, 0) for item in range(3)])
    assert pairs.states.shape == (3, 5, 6, CODEC.latent_channels, 12, 12) and pairs.latents is None
    assert data.timesteps == pytest.approx([*FlowMatching(5.0).warp(STEPS), 0.0], rel=1e-6)
    assert len(pairs.prompts) == 3 and set(pairs.prompts) <= {scene.prompt for scene in training_scenes()}

    config = release.config()
    teacher, encoder = load_denoiser(config.real_score), load_text_encoder(config.text_encoder)
    noise = pairs.states[:1, 0]
    assert noise.mean().abs() < 0.1 and noise.std() == pytest.approx(1, abs=0.05)
    with torch.no_grad():
        embeds, negative = encoder.encode(pairs.prompts[:1]), encoder.encode([""])
    sampling = SamplingConfig(steps=48, solver=Solver.euler, guidance_scale=config.sampling.guidance_scale)
    states = trajectory(teacher, noise, embeds, negative, sampling)
    for stored, index in zip(pairs.states[0], (0, 12, 24, 36, 48), strict=True):
        assert torch.allclose(stored, states[index][0], atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver_steps", "10"], "--solver_steps=10: rollout.denoising_steps="),
        (["--solver_steps", "0"], "--solver_steps=0 must be at least 1"),
        (["--count", "0"], "--count=0 must be at least 1"),
        (["--batch", "0"], "--batch=0 must be at least 1"),
        (["real_score.weights=nowhere"], "nowhere: no such file"),
    ],
)
def test_a_mistake_in_making_pairs_is_one_line(release, tmp_path, capsys, arguments, message):
    assert make_ode_pairs.main(["--config_path", release.config_path, *arguments, f"ode.pairs={tmp_path}"]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


WHOLE = {
    "benchmark": (["session"], "--frames", "--repeats", "--threads"),
    "count_cost": ([], "--frames", "--height", "--width", "--batch", "--iterations", "--critic_updates", "--gpus"),
    "repeat": ([], "--runs"),
    "reproduce": ([], "--prompts"),
}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "", "1.5", "1e3", "many"])
@pytest.mark.parametrize(("script", "option"), [(name, each) for name, (_, *all) in WHOLE.items() for each in all])
def test_a_number_of_things_is_a_whole_one_of_at_least_1(script, option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(f"scripts.{script}").parse_arguments([*WHOLE[script][0], f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: {value!r} is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"), [("--shift", "0 -1 nan inf x"), ("--shard_gb", "0 -1 nan"), ("--lora_scale", "nan inf x")]
)
def test_a_number_of_export_is_finite_and_within_its_bound(option, values, capsys):
    for value in values.split():
        with pytest.raises(SystemExit) as ended:
            export.parse_arguments(["in", "out", "--format", "wan", f"{option}={value}"])
        assert ended.value.code == 2 and f"argument {option}: {value!r} is not" in capsys.readouterr().err


def test_no_video_to_repeat_is_no_success(release, capsys):
    assert repeat.main(["--config_path", release.config_path, "--dry-run"]) == 2
    assert "no video was made" in capsys.readouterr().err
