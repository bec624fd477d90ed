"""The first lines of `train.py --dry-run` say what a run reproduces, where it starts, and which files it needs."""

import re
from pathlib import Path

import pytest
import yaml

import train
from trainer.about import NeededFile, describe, needed_files, origin, start
from trainer.config import Config
from utils.config import from_dict, load_config

pytest_plugins = ["tests.shapes_parts"]

REPOSITORY = Path(__file__).resolve().parents[2]
EVERY = sorted((REPOSITORY / "configs").rglob("*.yaml"))
RUNS = [path for path in EVERY if path.stem not in ("base", "wan_base")]


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_configuration_says_what_it_reproduces_where_it_starts_and_what_it_needs(path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert train.main(["--config_path", str(path.relative_to(REPOSITORY)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    first, second, third, fourth, *lines = printed.split("\n")
    assert first.removeprefix("# reproduces: ").startswith(path.read_text().split("\n")[0].lstrip("# "))
    assert second.startswith("# trains: ") and third.startswith("# starts from: ") and fourth.startswith("# needs")
    config = load_config(Config, path)
    needed = [line for line in lines if line.startswith("#   ")]
    assert len(needed) == len(needed_files(config)) > 0
    known = r"\(is there\)$|: (download|train|make) it"
    assert all(re.search(known, line) for line in needed), "nobody could know where a file comes from"
    assert from_dict(Config, yaml.safe_load(printed), "the printed configuration") == config


def test_it_starts_from_the_network_that_learns():
    shapes = REPOSITORY / "configs" / "shapes"
    starts = {
        name: start(load_config(Config, shapes / f"{name}.yaml")) for name in ("teacher_short", "causvid", "codec")
    }
    assert starts["teacher_short"] == "random weights (generator.preset=shapes)"
    assert starts["causvid"] == "student.weights=checkpoints/shapes/student"
    assert starts["codec"].startswith("an encoder fitted to clips")
    wan = load_config(Config, REPOSITORY / "configs" / "self_forcing_dmd.yaml")
    assert start(wan) == "student.weights=checkpoints/ode_init.pt (its averaged weights if it holds both kinds)"


def test_only_what_the_objective_reads_is_needed():
    def keys(which: str) -> set[str]:
        return {file.key for file in needed_files(load_config(Config, REPOSITORY / "configs" / f"{which}.yaml"))}

    assert "real_score.weights" in keys("self_forcing_dmd") and "real_score.weights" not in keys("self_forcing_gan")
    assert "data.switch_path" in keys("longlive") and "ode.pairs" in keys("shapes/self_forcing_regression")
    assert "ode.pairs" not in keys("self_forcing_dmd") and "data.path" not in keys("ode_init")
    assert keys("shapes/codec") == {"data.sample_prompts"}


def test_a_stage_is_trained_where_the_next_one_looks_for_it():
    file = NeededFile("student.weights", "logs/shapes/teacher_forcing/model/generator")
    command = "python train.py --config_path configs/shapes/teacher_forcing.yaml --logdir logs/shapes/teacher_forcing"
    assert origin(file, "x.yaml") == f"train it: {command}"
    assert (REPOSITORY / "configs/shapes/teacher_forcing.yaml").exists()
    assert "name a file of yours" in origin(NeededFile("student.weights", "mine.pt"), "x.yaml")


def test_a_file_that_is_there_is_called_so_and_a_file_without_a_comment_names_itself(tmp_path, release):
    lines = describe(release.config(), release.config_path)
    assert lines[0] == f"reproduces: {release.config_path}"
    assert all(line.endswith("(is there)") for line in lines[4:])
