"""The files that a run writes beside its videos: videos.jsonl (one line a video), config.yaml and a contact sheet."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig
from pipeline.inference.folder import Placement
from pipeline.inference.plan import SUFFIX
from pipeline.inference.recipe import Recipe, read_recipe
from utils.config import to_dict, to_yaml
from utils.errors import UserError
from utils.files import atomic_write_text, is_own_file
from utils.mp4 import is_complete
from utils.previews import save_contact_sheet
from utils.side_files import append_json_line, read_json_lines
from utils.video.file import count_frames
from utils.video.read import sample_frames

log = logging.getLogger("inference")

RECORDS = "videos.jsonl"
CONFIG = "config.yaml"
SHEET = "contact_sheet.png"
PARTIAL = re.compile(r"\.partial(-\d+)?$")
SHEET_VIDEOS = 32
SHEET_FRAMES = 8
SETTINGS = ("sampler", "generator", "rollout", "sampling", "optimize", "video", "device", "dtype")


def append_record(config: PipelineConfig, placement: Placement, *, frames: int, seconds: float) -> None:
    """Append the record of a finished video to videos.jsonl."""
    job, settings = placement.job, to_dict(config)
    record = _record(placement.path.name, job.recipe, frames)
    record |= {
        "image": None if job.image is None else str(job.image),
        "extends": None if job.extends is None else str(job.extends),
        "follows": None if job.follows is None else {"video": str(job.follows), "strength": job.recipe.strength},
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 2),
        "settings": {name: settings[name] for name in SETTINGS},
    }
    append_json_line(placement.path.parent / RECORDS, record)


def _record(name: str, recipe: Recipe, frames: int) -> dict[str, Any]:
    """Return the record of a video, without its time."""
    return {
        "file": name,
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "sample": recipe.sample,
        "image": recipe.image,
        "extends": recipe.extends,
        "follows": None if recipe.follows is None else {"video": recipe.follows, "strength": recipe.strength},
        "switches": [
            {"at": at, "prompt": prompt, "style": style} | dict(settings)
            for at, style, prompt, *settings in recipe.switches
        ],
        "weights": recipe.weights["generator"],
        "frames": frames,
        "seconds": None,
        "frames_per_second": None,
        "settings": recipe.settings,
    }


def complete_records(folder: Path) -> None:
    """Keep the latest record of each video. Restore records that a crash has lost from the metadata of the videos.

    Damaged lines are set aside with one warning.

    Raises:
        UserError: videos.jsonl is a link or a folder.
    """
    path = folder / RECORDS
    if os.path.lexists(path) and not is_own_file(path):
        raise UserError(f"{path}: is a link or a folder, so it is not written; move it away")
    before = read_json_lines(path)
    latest = {record["file"]: record for record in before if isinstance(record.get("file"), str)}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        if file.name in latest or file.name.startswith(".") or not (is_own_file(file) and is_complete(file)):
            continue
        if (recipe := read_recipe(file)) is not None and not PARTIAL.search(file.stem):
            with suppress(UserError):  # the video is damaged
                latest[file.name] = _record(file.name, recipe, count_frames(file))
    after = list(latest.values())
    if after != before:
        atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in after))


def save_run(config: PipelineConfig, placements: Sequence[Placement], folder: Path) -> None:
    """Write config.yaml and the contact sheet of this run.

    The files of an earlier run with another configuration are kept as `config-HASH.yaml` and
    `contact_sheet-HASH.png`.
    """
    text = to_yaml(config)
    _keep_earlier(folder, text)
    atomic_write_text(folder / CONFIG, text)
    shown = placements[:SHEET_VIDEOS]
    clips = [sample_frames(placement.path, SHEET_FRAMES) for placement in shown]
    save_contact_sheet(folder / SHEET, clips, [_label(placement) for placement in shown])
    log.info("%d video%s in %s, contact sheet %s", len(placements), "s"[: len(placements) != 1], folder, folder / SHEET)


def _label(placement: Placement) -> str:
    """Return the name of a video's file and, if the name does not hold it, its prompt."""
    name, title = placement.path.name, placement.job.title
    return name if title in name else f"{name}: {title}"


def _keep_earlier(folder: Path, text: str) -> None:
    """Rename config.yaml and its contact sheet if they differ from the new `text`; drop an earlier copy of `text`."""
    earlier = folder / CONFIG
    if not is_own_file(earlier) or (content := earlier.read_bytes()) == text.encode():
        return
    for path in (folder / CONFIG, folder / SHEET):
        if is_own_file(path):
            os.replace(path, _with_hash(path, content))
        _with_hash(path, text.encode()).unlink(missing_ok=True)


def _with_hash(path: Path, content: bytes) -> Path:
    """Return the name under which a file of an earlier run is kept. It holds a hash of that run's configuration."""
    return path.with_name(f"{path.stem}-{hashlib.sha256(content).hexdigest()[:8]}{path.suffix}")
