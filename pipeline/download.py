"""Downloads from the Hugging Face hub exactly the files that a configuration needs, with progress and resumption."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import filter_repo_objects

from model.weights.published import Published, not_found, published
from pipeline.config import PipelineConfig
from pipeline.hub import ask_hub
from pipeline.remote_file import RemoteFile
from utils.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
GB = 10**9


@dataclass(frozen=True)
class Fetch:
    """The missing files of one repository."""

    source: Published
    files: list[RemoteFile]

    @property
    def missing_bytes(self) -> int:
        """The bytes that are still to come; earlier attempts may have left a part."""
        return sum(file.size - file.bytes_here(self.source.into) for file in self.files)


def download_weights(config: PipelineConfig) -> None:
    """Download the missing files of a configuration. Prints the sizes first, then shows progress.

    An interrupted download is continued. The environment variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are used.

    Raises:
        UserError: a missing path that is not published, a hub that cannot be reached, or a disk that is too small.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise it logs every request
    sources = _sources(config)
    if constants.HF_HUB_OFFLINE and all(Path(path).exists() for path in weight_paths(config)):
        log.info("download: HF_HUB_OFFLINE is set; the files that are here are used as they are")
        return
    fetches = [fetch for source in sources if (fetch := _plan(source)).files]
    if not fetches:
        log.info("download: every file is here already")
        return
    for fetch in fetches:
        count, size = len(fetch.files), fetch.missing_bytes / GB
        log.info("download: %s: %d files, %.2f GB into %s", fetch.source.repository, count, size, fetch.source.into)
    _check_disk(fetches)
    for fetch in fetches:
        for file in fetch.files:
            _ask(fetch.source, partial(file.download, fetch.source.into))


def _sources(config: PipelineConfig) -> list[Published]:
    """Return one entry for each repository and folder, with the patterns of all its paths in the configuration."""
    found: dict[tuple[str, Path], Published] = {}
    for path in weight_paths(config):
        source = published(path)
        if source is not None:
            key = source.repository, source.into
            patterns = (found[key].patterns if key in found else ()) + source.patterns
            found[key] = replace(source, patterns=patterns)
        elif not Path(path).exists():
            raise not_found(path)
    return list(found.values())


def weight_paths(config: PipelineConfig) -> list[str]:
    """Return the paths of weights that a configuration names."""
    text = config.text_encoder
    return [path for path in (config.generator.weights, config.codec.weights, text.weights, text.tokenizer) if path]


def _plan(source: Published) -> Fetch:
    """Return the files of a repository that are missing here or have another size."""
    info = _ask(source, lambda: HfApi().model_info(source.repository, files_metadata=True))
    files = {entry.rfilename: RemoteFile.of(info, entry) for entry in info.siblings or []}
    wanted = list(filter_repo_objects(files, allow_patterns=list(source.patterns)))
    if not wanted:
        raise UserError(f"{source.repository}: holds no file that matches {', '.join(source.patterns)}; check the path")
    return Fetch(source, [files[name] for name in wanted if not files[name].is_here(source.into)])


def _check_disk(fetches: Iterable[Fetch]) -> None:
    for fetch in fetches:
        folder = next(parent for parent in fetch.source.into.absolute().parents if parent.exists())
        needed, free = fetch.missing_bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{folder}: {needed / GB:.2f} GB are needed and {free / GB:.2f} GB are free; make room")


def _ask(source: Published, call: Callable[[], T]) -> T:
    return ask_hub(source.repository, call, otherwise=f"download elsewhere with: {source.command}")
