"""Downloads from the Hugging Face hub exactly the files that a configuration needs, with progress and resumption."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from model.weights.published import Published, not_found, published
from pipeline.config import PipelineConfig
from utils.errors import UserError
from utils.files import set_aside

log = logging.getLogger(__name__)

T = TypeVar("T")
GB = 10**9


@dataclass(frozen=True)
class Fetch:
    """The missing files of one repository."""

    source: Published
    files: dict[str, int]
    """Path in the repository -> bytes."""


def download_weights(config: PipelineConfig) -> None:
    """Download the missing files of a configuration. Prints the sizes first, then shows progress.

    An interrupted download is continued. The environment variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are used.

    Raises:
        UserError: a missing path that is not published, a hub that cannot be reached, or a disk that is too small.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise it logs every request
    fetches = [fetch for source in _sources(config) if (fetch := _plan(source)).files]
    if not fetches:
        log.info("download: every file is here already")
        return
    for fetch in fetches:
        count, size = len(fetch.files), sum(fetch.files.values())
        log.info(
            "download: %s: %d files, %.2f GB into %s", fetch.source.repository, count, size / GB, fetch.source.into
        )
    _check_disk(fetches)
    for fetch in fetches:
        _fetch(fetch)


def _sources(config: PipelineConfig) -> list[Published]:
    """Return one entry for each repository and folder, with the patterns of all its paths in the configuration."""
    text, generator = config.text_encoder, config.generator
    found: dict[tuple[str, Path], Published] = {}
    for path in filter(None, (generator.weights, config.codec.weights, text.weights, text.tokenizer)):
        source = published(path)
        if source is not None:
            key = source.repository, source.into
            patterns = (found[key].patterns if key in found else ()) + source.patterns
            found[key] = replace(source, patterns=patterns)
        elif not Path(path).exists():
            raise not_found(path)
    return list(found.values())


def _plan(source: Published) -> Fetch:
    """Return the files of a repository that are missing here or have another size."""
    info = _reached(source, lambda: HfApi().model_info(source.repository, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    wanted = list(filter_repo_objects(sizes, allow_patterns=list(source.patterns)))
    if not wanted:
        raise UserError(f"{source.repository}: holds no file that matches {', '.join(source.patterns)}; check the path")
    return Fetch(source, {name: sizes[name] for name in wanted if not _is_here(source.into / name, sizes[name])})


def _is_here(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_disk(fetches: Iterable[Fetch]) -> None:
    for fetch in fetches:
        folder = next(parent for parent in fetch.source.into.absolute().parents if parent.exists())
        needed, free = sum(fetch.files.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{folder}: {needed / GB:.2f} GB are needed and {free / GB:.2f} GB are free; make room")


def _fetch(fetch: Fetch) -> None:
    source = fetch.source
    for name, size in fetch.files.items():
        if os.path.lexists(path := source.into / name):  # the hub's client would treat it as complete
            set_aside(path, f"does not have the {size} bytes that the hub states", log)
    options = {"local_dir": source.into, "allow_patterns": list(fetch.files)}
    _reached(source, lambda: snapshot_download(source.repository, **options))
    for name, size in fetch.files.items():
        if not _is_here(path := source.into / name, size):
            raise UserError(
                f"{path}: does not have the size that the hub states ({size} bytes); delete it and try again"
            )


def _reached(source: Published, call: Callable[[], T]) -> T:
    """Return the result of a call to the hub. Every error becomes one line."""
    try:
        return call()
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = f"or download elsewhere with: {source.command}"
        raise UserError(f"{source.repository}: cannot be downloaded ({reason}); check the network, {remedy}") from None
