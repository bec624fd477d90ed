"""Where weights lie: the folders and file names of published releases, and the command that downloads a missing one."""

import re
from pathlib import Path

from utils.errors import UserError
from utils.side_files import read_json

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# What other programs call the weights in a folder.
OTHER_WEIGHT_FILES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
WEIGHT_ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
# What a release calls its parts: a diffusers pipeline's subfolder, then Wan's own file or folder.
PARTS = {
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("tokenizer", "google/umt5-xxl"),
    "vae": ("vae", "Wan2.1_VAE.pth"),
}
# Published weights: what a path to them looks like → the command that fetches them to where that path points.
DOWNLOADS = (
    (r"(?P<into>.*Wan2\.1-T2V-1\.3B)(/.*)?", "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {into}"),
    (r"(?P<into>.*Wan2\.1-T2V-14B)(/.*)?", "hf download Wan-AI/Wan2.1-T2V-14B --local-dir {into}"),
    (
        r"(?P<into>.*?)/?(?P<file>checkpoints/(self_forcing_\w+|ode_init)\.pt)",
        "hf download gdhe17/Self-Forcing {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>(chunkwise|framewise|causal-forcing\+\+)/[\w-]+\.pt)",
        "hf download zhuhz22/Causal-Forcing {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>(autoregressive_checkpoint|wan_causal_ode_checkpoint_model_003000)/model\.pt)",
        "hf download tianweiy/CausVid {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?models/(longlive_base|lora)\.pt",
        "hf download Efficient-Large-Model/LongLive-1.3B --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>krea-realtime-video-14b\.safetensors)",
        "hf download krea/krea-realtime-video {file} --local-dir {into}",
    ),
    (
        r"(?P<into>.*?)/?(?P<file>taew2_1\.pth)",
        "curl -L --create-dirs -o {into}/{file} https://github.com/madebyollin/taehv/raw/main/{file}",
    ),
)


def not_found(path: str | Path) -> UserError:
    """The error for weights that are not there: which file, where it was looked for, and how to get it."""
    path = Path(path)
    remedy = "check the path, or download the weights"
    for pattern, command in DOWNLOADS:
        if match := re.fullmatch(pattern, path.as_posix()):
            parts = {name: value or "." for name, value in match.groupdict().items()}
            remedy = f"download it: {command.format(**parts)}"
            break
    return UserError(f"{path}: no such file or folder (looked for {path.absolute()}); {remedy}")


def find_part(path: str | Path, part: str) -> Path:
    """Where a release folder keeps `part` (a key of PARTS); `path` itself where it is no such folder."""
    path = Path(path)
    return next((path / name for name in PARTS[part] if (path / name).exists()), path)


def read_config(folder: str | Path) -> dict:
    """The config.json of a model folder; UserError if it is missing or not a JSON object."""
    return read_json(Path(folder) / CONFIG_FILE, dict)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, whatever they are called; hidden files are not."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in WEIGHT_ENDINGS)
