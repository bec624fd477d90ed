"""A training goes on after damage, keeps the files of an earlier run, and never shares its folder."""

import json
import os
from pathlib import Path

import pytest

import train
from scripts.endurance.kills import launch, repeated_metrics, wait
from utils.locks import folder_lock

pytest_plugins = ["tests.shapes_parts"]


@pytest.fixture
def flags(release, tmp_path, restore_logging) -> list[str]:
    """Give the arguments of train.py with a small objective and the folder `run`."""
    common = ["--config_path", release.config_path, "--no_visualize", "--logdir", str(tmp_path / "run")]
    return [*common, "objective=autoencoder", "trainer.batch_size=1", "trainer.save_every=1"]


def steps(logdir: Path) -> list[int]:
    return [line["step"] for line in repeated_metrics(logdir)]


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_from_the_newest_good_checkpoint_and_ends_if_there_is_none(flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*flags, "trainer.steps=2"]) == 0
    newest = run / "checkpoints" / "step_00000002"
    (newest / "state.json").write_text("{}")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert train.main([*flags, "trainer.steps=3"]) == 0
    errors = capsys.readouterr().err
    assert errors.count("is damaged") == 1 and errors.count("1 damaged line set aside") == 1
    assert "step_00000002.damaged" in errors and "goes on from step_00000001" in errors
    assert steps(run) == [1, 2, 3] and (run / "metrics.jsonl.damaged").read_text() == '{"step": 2, "lo\n'
    for checkpoint in (run / "checkpoints").glob("step_????????"):
        os.truncate(checkpoint / "rank_00000.safetensors", 100)
    before = sorted(run.rglob("*"))
    assert train.main([*flags, "trainer.steps=4"]) == 2
    assert "none of its 2 checkpoints is good" in last_line(capsys)
    assert steps(run) == [1, 2, 3] and sorted(run.rglob("*")) == before
    assert train.main([*flags, "trainer.steps=1", "--no_resume"]) == 0
    assert steps(run) == [1] and len(list(run.glob("checkpoints.old1/step_*"))) == 3
    assert (
        (run / "model.old1").is_dir() and (run / "model.pt.old1").is_file() and (run / "metrics.jsonl.old1").is_file()
    )


def test_two_processes_agree_on_the_checkpoint(release, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    common = ["--config_path", release.config_path, "--no_visualize", "--logdir", str(run)]
    flags = [*common, "objective=autoencoder", "trainer.batch_size=1", "trainer.save_every=1"]
    wait(launch([*flags, "trainer.steps=2"], 2), timeout=200)
    damaged = run / "checkpoints" / "step_00000002" / "rank_00001.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    wait(launch([*flags, "trainer.steps=3"], 2), timeout=200)
    errors = (tmp_path / "run.0.log").read_text()
    assert errors.count("is damaged") == 1 and "rank_00001.safetensors has changed" in errors
    assert steps(run) == [1, 2, 3]


def test_another_objective_in_a_folder_that_holds_a_run_is_one_line(flags, tmp_path, capsys):
    assert train.main([*flags, "trainer.steps=1"]) == 0
    assert train.main([*flags, "objective=self_forcing_dmd"]) == 2
    assert "does not fit this run: objective (checkpoint: autoencoder, run: self_forcing_dmd)" in last_line(capsys)


def test_a_folder_in_use_is_refused_in_one_line_and_free_after_a_crash(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run", "a training"):
        assert train.main([*flags, "trainer.steps=1"]) == 2
        assert "is in use by a training" in last_line(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    child = os.fork()
    if child == 0:
        lock = folder_lock(tmp_path / "run", "a training that is killed")
        lock.__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert train.main([*flags, "trainer.steps=1"]) == 0


def test_metrics_are_not_written_through_a_link(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "mine.txt")
    assert train.main([*flags, "trainer.steps=1"]) == 2
    assert "is a link or a folder" in last_line(capsys) and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("key", ["--logdir", "--config_path", "codec.weights", "data.sample_prompts", "data.path"])
def test_a_path_of_5000_characters_is_one_line(flags, capsys, key):
    long = "x" * 5000
    extra = [key, long] if key.startswith("--") else [f"{key}={long}", "objective=diffusion", "data.kind=prompts"]
    assert train.main([*flags, "trainer.steps=1", *extra]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "INFO" not in line]
    assert line.startswith("error: ")


def test_a_folder_name_with_an_interpolation_is_taken_as_it_stands(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag if flag != str(tmp_path / "run") else "${HOME}/run" for flag in flags]
    assert train.main([*flags, "trainer.steps=1", "ode.pairs=${x}"]) == 0
    assert json.loads((tmp_path / "${HOME}/run/checkpoints/step_00000001/state.json").read_text())["config"]["ode"] == {
        "pairs": "${x}"
    }
    assert train.main([*flags, "trainer.steps=1", "ode.pairs=${x}"]) == 0
