"""Where weights lie: the folders and file names of published releases."""

from pathlib import Path

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


def find_part(path: str | Path, part: str) -> Path:
    """The place of `part` (a key of PARTS) in a release folder; `path` itself if it is no such folder."""
    path = Path(path)
    return next((path / name for name in PARTS[part] if (path / name).exists()), path)


def read_config(folder: str | Path) -> dict:
    """The config.json of a model folder; UserError if it is missing or not a JSON object."""
    return read_json(Path(folder) / CONFIG_FILE, dict)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, whatever they are called; hidden files are not."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in WEIGHT_ENDINGS)
