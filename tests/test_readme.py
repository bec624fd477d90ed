"""README.md is correct: its commands run one after the other in a fresh copy, and each makes the promised files.

SHORTER lists how commands are shortened. UNRUN says why a command is not run. Such a command is checked in another way.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model.weights.published import not_found
from tests.commands import REPOSITORY, Command, copy_repository, read_commands
from tests.forked import Forked
from tests.made_once import made_once
from tests.serving.browser import wait_until
from utils.side_files import read_json_lines
from utils.video.read import read_video

README = REPOSITORY / "README.md"
DOCUMENTS = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MOST_LINES = 200
COMMANDS = read_commands(README)
FIRST = "a large red circle moving up and right on a navy background-0.mp4"

# Sizes in commands of the README that the tests reduce, with the reason.
SHORTER = [
    (r"--num_output_frames (\d+)", "--num_output_frames 12", "45 frames show as well as more that a length is obeyed"),
    (r"--switch '4s:", "--switch '1s:", "within the shorter length"),
    (r"trainer.steps=20", "trainer.steps=1 trainer.batch_size=1 dmd.critic_updates=1", "a step takes seconds"),
]


@dataclass(frozen=True)
class Run:
    """The expected result of a command."""

    files: tuple[str, ...] = ()
    """Patterns. Each one must match at least one new file."""
    says: str = ""
    frames: dict[str, int] = field(default_factory=dict)
    """Video -> its number of frames."""


# Beginning of a command -> its expected result.
RUNS = {
    "python inference.py": Run(
        ("videos/shapes/*.mp4", "videos/shapes/contact_sheet.png", "videos/shapes/config.yaml"),
        frames={f"videos/shapes/{(REPOSITORY / 'prompts/shapes.txt').read_text().splitlines()[0]}-0.mp4": 33},
    ),
    "python inference.py --prompt": Run((f"videos/shapes/{FIRST}",), frames={f"videos/shapes/{FIRST}": 33}),
    "python inference.py --data_path": Run(("videos/long/*.mp4",)),
    "python inference.py --i2v": Run(("videos/from_images/*.mp4",)),
    "python inference.py --dry-run": Run(says="window: 9"),
    "python inference.py --output_folder videos/switch": Run(("videos/switch/*.mp4",)),
    "python train.py --config_path configs/shapes/self_forcing_dmd.yaml --logdir logs/try": Run(
        ("logs/try/model/generator/model.safetensors", "logs/try/metrics.jsonl", "logs/try/samples/*/*.mp4"),
    ),
    "python -m trainer.report": Run(("logs/try/report.html",)),
}
# Beginning of a command -> why it is not run. test_what_is_not_run_is_right_all_the_same checks it instead.
UNRUN = {
    "pip install": "the tests run in the environment that it makes",
    "pytest": "these are the tests",
    "hf download": "there is no network; the program itself names the same command for a missing file",
    "python inference.py --config_path configs/self_forcing_dmd.yaml": "the weights are downloads; it runs, word for "
    "word, on a fake release in tests/test_fake_release.py",
    "torchrun": "it needs eight GPUs; its configuration is resolved",
    "python demo.py": "it never ends; test_the_demo_serves_its_page_and_ends_with_ctrl_c runs it",
}


def rule(command: Command, rules: dict) -> str | None:
    """Return the longest key of `rules` that the command begins with, or None."""
    return max((begin for begin in rules if f"{command.text} ".startswith(f"{begin} ")), key=len, default=None)


def is_run(command: Command) -> bool:
    return len(rule(command, UNRUN) or "") < len(rule(command, RUNS) or "")


STEPS = [command for command in COMMANDS if is_run(command)]


def shorter(text: str) -> str:
    for pattern, replacement, _ in SHORTER:
        text = re.sub(pattern, replacement, text)
    return text


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a reader: `python` is that of these tests, and HOME is empty."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return clean | {"PATH": path, "HOME": str(home)}


def copy_with_short_files(folder: Path) -> None:
    """Write a clone with two prompts in each file of prompts: two show as well as eight that a file is obeyed."""
    copy_repository(folder)
    for prompts in (path for path in (folder / "prompts").iterdir() if path.is_file()):
        prompts.write_text("".join(prompts.read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")


def new_python(command: Command, copy: Path, said: Path) -> int:
    """Run a command in a shell, as a reader does. Return its exit code."""
    with said.open("w") as output:
        return subprocess.run(
            shorter(command.text), shell=True, cwd=copy, env=environment(copy.with_name("readme home")),
            stdout=output, stderr=subprocess.STDOUT, timeout=240,
        ).returncode  # fmt: skip


@pytest.fixture(scope="session")
def after(tmp_path_factory) -> Iterator[Callable[[int], tuple[Path, str, set[str]]]]:
    """Give a function that runs the first commands, and returns the copy, the last output and the new files.

    The first command is a new Python in a shell. The others are forks of one Python, which imports torch only once.
    """
    forked: list[Forked] = []

    def execute(number: int, copy: Path, said: Path) -> int:
        if number == 0:
            return new_python(STEPS[0], copy, said)
        if not forked:
            forked.append(Forked(copy, environment(copy.with_name("readme home"))))
        program, *words = shlex.split(shorter(STEPS[number].text))
        assert program == "python"
        return forked[0].run(words, said)

    def after(number: int) -> tuple[Path, str, set[str]]:
        if number < 0:
            return made_once(tmp_path_factory, "readme", copy_with_short_files), "", set()
        copy, *_ = after(number - 1)

        def run(notes: Path) -> None:
            before = set(copy.rglob("*"))
            code = execute(number, copy, notes / "said")
            assert code == 0, (notes / "said").read_text()
            added = sorted(path.relative_to(copy).as_posix() for path in set(copy.rglob("*")) - before)
            (notes / "added").write_text("\n".join(added))

        notes = made_once(tmp_path_factory, f"readme step {number}", run)
        return copy, (notes / "said").read_text(), set((notes / "added").read_text().splitlines())

    yield after
    for each in forked:
        each.close()


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[command.text[:60] for command in STEPS])
def test_a_command_run_after_the_others_makes_what_it_says(after, number):
    copy, said, added = after(number)
    expected = RUNS[rule(STEPS[number], RUNS)]
    for pattern in expected.files:
        assert any(Path(name).match(pattern) for name in added), f"{pattern} is not among {sorted(added)}"
    for name, frames in expected.frames.items():
        assert len(read_video(copy / name)) == frames
    assert expected.says in said


def test_every_command_is_run_or_has_its_reason():
    unknown = [command.text for command in COMMANDS if rule(command, RUNS) is rule(command, UNRUN) is None]
    assert not unknown
    assert len(STEPS) >= 8


def test_no_command_is_answered_with_videos_of_another(after):
    """In the end all videos of the README exist, each with its line in videos.jsonl."""
    copy, *_ = after(len(STEPS) - 1)
    for folder in (copy / "videos").iterdir():
        records = read_json_lines(folder / "videos.jsonl", dict, repair=False)
        assert sorted(path.name for path in folder.glob("*.mp4")) == sorted(record["file"] for record in records)


def matching_download(words: list[str]) -> str:
    """Return the command that the program names when the files of this download command are missing."""
    path = words[3] if words[3] != "--local-dir" else words[-1]
    return str(not_found(path)).partition("download it: ")[2]


@pytest.mark.parametrize("command", [each for each in COMMANDS if not is_run(each)], ids=lambda each: each.text[:60])
def test_what_is_not_run_is_right_all_the_same(command, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    match command.words:
        case ["pip", "install", "-r", file]:
            assert Path(file).is_file()
        case ["hf", "download", *_]:
            assert matching_download(command.words) == command.text
        case ["python", "inference.py", *arguments]:
            import inference
            from tests.test_fake_release import COMMAND

            assert command.words == COMMAND.split()
            assert inference.main([*arguments, "--dry-run"]) == 0
        case ["torchrun", nproc, "train.py", *arguments]:
            import train

            assert nproc.startswith("--nproc_per_node=")
            assert train.main([*arguments, "--dry-run"]) == 0
        case ["pytest"] | ["python", "demo.py"]:
            pass
        case _:
            raise AssertionError(f"no check for {command}")


def test_the_demo_serves_its_page_and_ends_with_ctrl_c(after, tmp_path):
    copy, *_ = after(-1)
    (command,) = [each for each in COMMANDS if each.words[:2] == ["python", "demo.py"]]
    process = subprocess.Popen(
        [*command.words, "--no-browser", "--port", "0", "--clips_folder", str(tmp_path)],
        cwd=copy, env=environment(tmp_path) | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        wait_until(lambda: b"canvas" in fetch(match[0]))
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert "Traceback" not in rest
    finally:
        process.kill()


def fetch(address: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(address, timeout=5) as answer:
        return answer.read()


def test_readme_is_read_in_one_sitting():
    assert README.read_text("utf-8").count("\n") <= MOST_LINES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(document):
    text = document.read_text("utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r'<img src="([^"]+)"', text)
    files = {Path(os.path.relpath(document.parent / target, REPOSITORY)).as_posix() for target in targets}
    assert not {file for file in files if not (REPOSITORY / file).exists()}
