"""The programs and packages work from any folder; what they write goes into that folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import SelfForcingPipeline
from pipeline.config import load_pipeline_config
from trainer.config import Config
from utils.checkout import CHECKOUT, find_shipped
from utils.config import load_config
from utils.errors import UserError

CONFIG = "configs/shapes/self_forcing_dmd.yaml"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_the_checkout_are_found_from_elsewhere(elsewhere):
    config = load_pipeline_config(CONFIG)
    assert Path(config.generator.weights).exists() and Path(config.codec.weights).exists()
    assert config.inference.data_path == str(CHECKOUT / "prompts/shapes.txt")
    assert config.inference.output_folder == "videos/shapes", "outputs go into the current folder"
    training = load_config(Config, CONFIG)
    assert Path(training.student.weights).exists() and Path(training.data.sample_prompts).exists()


def test_files_of_the_current_folder_come_first(elsewhere):
    (elsewhere / "prompts").mkdir()
    (elsewhere / "prompts" / "shapes.txt").write_text("mine\n")
    assert load_pipeline_config(CONFIG).inference.data_path == "prompts/shapes.txt"
    assert find_shipped("prompts/shapes.txt") == "prompts/shapes.txt"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "nowhere/at/all",
        pytest.param("x" * 5000, id="too long"),
        pytest.param("a\0b", id="zero"),
        "/etc/hostname",
        str(CHECKOUT / "configs"),
    ],
)
def test_other_paths_stay_as_they_are(elsewhere, path):
    assert find_shipped(path) == path


def test_a_missing_file_is_named_as_it_was_given(elsewhere):
    with pytest.raises(UserError, match=r"^configs/nowhere.yaml: "):
        load_pipeline_config("configs/nowhere.yaml")


def test_the_pipeline_of_the_python_example_is_found_from_elsewhere(elsewhere):
    config = SelfForcingPipeline.from_pretrained("checkpoints/shapes").config
    for part in (config.generator, config.codec, config.text_encoder):
        assert Path(part.weights).is_dir() and Path(part.weights).parent == CHECKOUT / "checkpoints/shapes"


def test_no_wheel_is_built(tmp_path):
    pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools 70.1 or later is not installed")
    folder = tmp_path / "build"
    run = subprocess.run(
        [sys.executable, str(CHECKOUT / "setup.py"), "-q", "bdist_wheel", "--dist-dir", str(folder)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0 and not folder.exists()
    assert run.stderr.splitlines()[-1].startswith("error: no wheel is built") and "pip install -e ." in run.stderr
