"""Fixtures that run inference.py on the tiny release, and helpers to check its files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import inference
from scripts.endurance.kills import launch, log_file
from utils.video.read import read_video

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def make(release, tmp_path):
    """Give a function that runs inference.py into a folder of tmp_path and returns the folder."""

    def make(*arguments, folder: str = "videos") -> Path:
        path = tmp_path / folder
        code = inference.main(["--config_path", release.config_path, "--output_folder", str(path), *arguments])
        assert code == 0
        return path

    return make


@pytest.fixture
def refuse(release, tmp_path, capsys, monkeypatch):
    """Give a function that runs inference.py with a mistake and returns its one line. It must load no generator."""

    def loaded(*args, **kwargs):
        raise AssertionError("a mistake must be found before the codec and the text encoder load")

    monkeypatch.setattr("pipeline.text_to_video.load_codec", loaded)
    monkeypatch.setattr("pipeline.text_to_video.load_prompt_cache", loaded)

    def refuse(*arguments, config_path: Path | str = release.config_path) -> str:
        folder = ["--output_folder", str(tmp_path / "refused")]
        code = inference.main(["--config_path", str(config_path), *folder, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
        return err

    return refuse


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are read."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("pipeline.text_to_video.load_denoiser", loaded)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "videos.jsonl").read_text(encoding="utf-8").splitlines()]


def videos(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.mp4"))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the time of every video."""
    return {name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in videos(folder)}


def same(first: Path, second: Path) -> bool:
    return torch.equal(read_video(first), read_video(second))


def start(release, folder: Path, *arguments: str, **options) -> BaseProcess:
    """Run inference.py in a new process, which logs to log_file(folder)."""
    command = ["--config_path", release.config_path, "--output_folder", str(folder), *arguments]
    (process,) = launch(command, program="inference", **options)
    return process


def end(process: BaseProcess, folder: Path, seconds: float = 60) -> tuple[int, str]:
    """Wait for the end of a process of :func:`start`. Return its exit code and its log."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"it has not ended: {log_file(folder).read_text()}")
    return process.exitcode, log_file(folder).read_text()


def wait_for(process: BaseProcess, folder: Path, condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a process of :func:`start` has come so far. A process that does not come so far is killed."""
    limit = time.monotonic() + seconds
    while not condition():
        if not process.is_alive() or time.monotonic() > limit:
            process.kill()
            raise AssertionError(log_file(folder).read_text())
        time.sleep(0.02)
