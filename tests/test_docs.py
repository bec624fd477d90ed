"""Every command of docs/*.md and CONTRIBUTING.md is checked in a copy of the repository beside a fake Wan release.

| command | how |
|---|---|
| inference.py | makes its videos, with a few small frames: see `few_frames` |
| train.py, also under torchrun | resolves its configuration (--dry-run); tests/test_train_cli.py trains |
| demo.py | reads its arguments and its configuration, because it would not end. tests/serving/ runs it |
| scripts/*.py, python -m trainer.report | read their arguments, because they take minutes. Each has its own test |
| pip, hf, curl, apt, git clone | there is no network: their names are compared with those in the code |
| docker, sbatch, ssh, nginx and the like | they are not installed: the files that they name must exist |
"""

import importlib
import os
import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, Command, copy_repository, read_commands
from tests.fake_release import copy_fake_release
from tests.made_once import made_once
from utils.config import load_config

pytest_plugins = ["tests.shapes_parts"]

PAGES = [REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = [command for page in PAGES for command in read_commands(page)]
# Programs that are not installed, or that would use the network. The files that they name must exist.
ELSEWHERE = {"sbatch", "srun", "ssh", "scp", "docker", "nginx", "caddy", "systemctl", "brew", "apt", "apt-get", "sudo"}
CHECKS = {"pytest", "ruff", "bash"}
# Commands that the program names when a file is missing.
KNOWN_PLACES = "\n".join((REPOSITORY / file).read_text() for file in ("model/weights/published.py", "utils/prompts.py"))


def few_frames(words: list[str]) -> list[str]:
    """Return the arguments of an inference.py command for videos of at most two chunks, with few pixels for Wan."""
    short = [str(min(int(word), 6)) if before == "--num_output_frames" else word
             for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    config = short[short.index("--config_path") + 1] if "--config_path" in short else "configs/shapes/base.yaml"
    if "shapes" not in config:
        short += ["video.height=32", "video.width=48", "sampling.steps=2"]
    return short if "--num_output_frames" in short else [*short, "video.num_frames=6"]


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """Give a clone with the downloads of the README, as a reader has it. Prompt files have only two prompts."""

    def write(folder: Path) -> None:
        copy_repository(folder)
        copy_fake_release(tmp_path_factory, folder)
        for prompts in (folder / "prompts").iterdir():
            if prompts.is_file():
                prompts.write_text("".join(prompts.read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")

    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")  # one program at a time writes into a folder of videos
    return made_once(tmp_path_factory, f"docs {worker}", write)


def without_launcher(words: list[str]) -> list[str]:
    """Replace `torchrun OPTIONS train.py …` by `python train.py …`, and remove variables set before a command."""
    words = [
        word
        for index, word in enumerate(words)
        if "=" not in word or any(w in ("python", "torchrun") for w in words[:index])
    ]
    if words[0] == "torchrun":
        program = next(index for index, word in enumerate(words) if word.endswith(".py"))
        assert all(re.match(r"--\w[\w-]*(=\S+)?$", option) for option in words[1:program]), words
        return ["python", *words[program:]]
    return words


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command)[:90])
def test_a_command_of_a_page_does_what_it_says(command: Command, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    match without_launcher(command.words):
        case ["python", "inference.py", *arguments]:
            assert importlib.import_module("inference").main(few_frames(arguments)) == 0
        case ["python", "train.py", *arguments]:
            assert importlib.import_module("train").main([*arguments, "--dry-run"]) == 0
        case ["python", "demo.py", *arguments]:
            demo, served = importlib.import_module("demo"), []
            monkeypatch.setattr("pipeline.serving.run.serve", lambda *_: served.append(True))
            assert demo.main([*arguments, "--port", "0"]) == 0 and served
        case ["python", "-m", "trainer.report", _]:
            pass
        case ["python", script, *arguments] if script.startswith("scripts/"):
            args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_arguments(arguments)
            if hasattr(args, "config_path"):
                from trainer.config import Config

                load_config(Config, args.config_path, getattr(args, "overrides", []))
        case ["hf", "download", repository, *_]:
            assert repository in KNOWN_PLACES
        case ["curl", "-L", *_, address]:
            assert re.sub(r"[\w.-]+$", "", address) in KNOWN_PLACES
        case ["pip", "install", *names]:
            check_packages(names)
        case ["git", "clone", *_] | ["cd", _]:
            pass
        case [program, *arguments] if program.startswith("scripts/") or program in ELSEWHERE | CHECKS:
            named = [word for word in (program, *arguments) if re.match(r"(scripts|configs|prompts)/|\.ci/", word)]
            assert all((copy / word).exists() for word in named)
        case _:
            raise AssertionError(f"no rule of this file covers {command}")


def check_packages(names: list[str]) -> None:
    """Check that a requirements file exists, that setup.py has an extra, and that one of them names a package."""
    known = "".join(
        (REPOSITORY / file).read_text() for file in ("setup.py", "requirements.txt", "requirements-dev.txt")
    )
    for name in names:
        if name.endswith(".txt"):
            assert (REPOSITORY / name).is_file()
        elif match := re.search(r"\[(\w+)\]", name):
            assert f'"{match[1]}"' in known, name
        elif not name.startswith("-"):
            assert re.split(r"[<>=~]", name)[0] in known, f"{name} is in no requirements file and no extra"
