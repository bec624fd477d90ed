"""The folders and file names of published weights."""

from pathlib import Path

from utils.side_files import read_json

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# Names that other programs give the weights in a folder.
OTHER_WEIGHT_FILES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
WEIGHT_ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
# Part -> its names in a release: the subfolder of a diffusers pipeline, then Wan's own file or folder.
PARTS = {
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("tokenizer", "google/umt5-xxl"),
    "vae": ("vae", "Wan2.1_VAE.pth"),
}


def find_part(path: str | Path, part: str) -> Path:
    """Return the path of `part` (a key of PARTS) in a release folder, or `path` itself if it is no release folder."""
    path = Path(path)
    return next((path / name for name in PARTS[part] if (path / name).exists()), path)


def read_config(folder: str | Path) -> dict:
    """Return the config.json of a model folder. Raises UserError if it is missing or not a JSON object."""
    return read_json(Path(folder) / CONFIG_FILE, dict)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, whatever their names are. Hidden files are ignored."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in WEIGHT_ENDINGS)
