"""The small files of a diffusers pipeline folder of Wan: its index and its scheduler."""

import json
from importlib.metadata import version
from pathlib import Path

from utils.files import atomic_write_text
from utils.side_files import read_json

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULER = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True}


def write_index(folder: str | Path, *, tokenizer: str, shift: float) -> None:
    """Write the scheduler's configuration and model_index.json, so that diffusers' WanPipeline reads the folder.

    Args:
        tokenizer: the tokenizer's class in transformers.
        shift: timestep shift of the scheduler.
    """
    about = {"_diffusers_version": version("diffusers")}
    scheduler = {"_class_name": "UniPCMultistepScheduler", **about, **SCHEDULER, "flow_shift": shift}
    (Path(folder) / SCHEDULER_FILE).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(Path(folder) / SCHEDULER_FILE, json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": "WanPipeline",
        **about,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    atomic_write_text(Path(folder) / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def read_shift(folder: str | Path) -> float | None:
    """Return the timestep shift of a folder's scheduler; None if the folder names none. Raises UserError."""
    path = Path(folder) / SCHEDULER_FILE
    shift = read_json(path, dict).get("flow_shift") if path.is_file() else None
    return float(shift) if isinstance(shift, int | float) else None
