"""Published weights: the repository of each known path, and the command that downloads it."""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

# What a path to published weights looks like -> the repository on the Hugging Face hub. `into` is the local folder that
# mirrors the repository, and `file` is the path in it. A path without `file` lies in the folder of a whole release.
REPOSITORIES = (
    (r"(?P<into>.*Wan2\.1-T2V-1\.3B)(/.*)?", "Wan-AI/Wan2.1-T2V-1.3B"),
    (r"(?P<into>.*Wan2\.1-T2V-14B-StepDistill-CfgDistill)(/.*)?", "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill"),
    (r"(?P<into>.*Wan2\.1-T2V-14B)(/.*)?", "Wan-AI/Wan2.1-T2V-14B"),
    (r"(?P<into>.*?)/?(?P<file>checkpoints/(self_forcing_\w+|ode_init)\.pt)", "gdhe17/Self-Forcing"),
    (r"(?P<into>.*?)/?(?P<file>(chunkwise|framewise|causal-forcing\+\+)/[\w-]+\.pt)", "zhuhz22/Causal-Forcing"),
    (
        r"(?P<into>.*?)/?(?P<file>(autoregressive_checkpoint|wan_causal_ode_checkpoint_model_003000)/model\.pt)",
        "tianweiy/CausVid",
    ),
    (r"(?P<into>.*?)/?models/(longlive_base|lora)\.pt", "Efficient-Large-Model/LongLive-1.3B"),
    (r"(?P<into>.*?)/?(?P<file>krea-realtime-video-14b\.safetensors)", "krea/krea-realtime-video"),
)
OTHER_COMMANDS = (
    (
        r"(?P<into>.*?)/?(?P<file>taew2_1\.pth)",
        "curl -L --create-dirs -o {into}/{file} https://github.com/madebyollin/taehv/raw/main/{file}",
    ),
)
TRANSFORMER_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
"""The files of a Wan release that belong to its transformer."""


@dataclass(frozen=True)
class Published:
    """Files of a repository on the hub."""

    repository: str
    into: Path
    """The local folder that mirrors the repository."""
    file: str | None
    """The file. None: the path belongs to a release of several files."""
    patterns: tuple[str, ...]
    """Shell patterns of the files of the repository that belong to the path."""

    @property
    def command(self) -> str:
        """The shell command that downloads them."""
        file = "" if self.file is None else f" {self.file}"
        return f"hf download {self.repository}{file} --local-dir {self.into}"


def published(path: str | Path) -> Published | None:
    """Return the source of a path to known weights, or None."""
    path = Path(path)
    for pattern, repository in REPOSITORIES:
        if (match := re.fullmatch(pattern, path.as_posix())) is None:
            continue
        into, file = Path(match["into"] or "."), match.groupdict().get("file")
        inside = path.relative_to(into).as_posix()
        patterns = TRANSFORMER_FILES if inside == "." else (inside, f"{inside}/*")
        return Published(repository, into, file, patterns)
    return None


def not_found(path: str | Path) -> UserError:
    """Return the error for missing weights: the file, the place where it was looked for, and the command to get it."""
    path = Path(path)
    remedy = "check the path, or download the weights"
    if (source := published(path)) is not None:
        remedy = f"download it: {source.command}"
    for pattern, command in OTHER_COMMANDS:
        if match := re.fullmatch(pattern, path.as_posix()):
            remedy = f"download it: {command.format(into=match['into'] or '.', file=match['file'])}"
    return UserError(f"{path}: no such file or folder (looked for {path.absolute()}); {remedy}")
