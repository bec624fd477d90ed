"""The commands of README.md and docs/*.md, and a fresh copy of the repository to run them in."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Files that a clone does not have.
MADE_HERE = (
    ".git",
    "videos",
    "logs",
    "wandb",
    "data",
    "wan_models",
    "build",
    "dist",
    "*venv*",
    "__pycache__",
    ".*_cache",
)


@dataclass(frozen=True)
class Command:
    """One command of a document, without its comment."""

    document: str
    """Path in the repository."""
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def read_commands(document: Path) -> list[Command]:
    """Return every command of the bash blocks in order. Continued lines are joined, and `a && b` is two commands."""
    name = document.relative_to(REPOSITORY).as_posix()
    commands = []
    for block in BLOCK.findall(document.read_text("utf-8")):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            code = shlex.join(shlex.split(line, comments=True))
            parts = re.split(r" '&&' ", code)
            commands += [Command(name, part) for part in parts if part]
    return commands


def copy_repository(folder: Path) -> None:
    """Write the files of a clone into an existing folder."""

    def left_out(path: str, names: list[str]) -> set[str]:
        ignored = shutil.ignore_patterns(*MADE_HERE)(path, names)
        if Path(path) == REPOSITORY / "checkpoints":
            ignored |= set(names) - {"shapes"}
        return ignored

    shutil.copytree(REPOSITORY, folder, ignore=left_out, dirs_exist_ok=True)
