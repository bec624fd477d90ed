"""Downloads from the Hugging Face hub exactly the files that a configuration needs, with progress and resumption."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
UNFINISHED = ".unfinished-download"  # in the folder of a release until all of its wanted files are there
REPORT_SECONDS = 0.3


@dataclass(frozen=True)
class Fetch:
    """The missing files of one repository."""

    source: Published
    files: list[RemoteFile]

    @property
    def missing_bytes(self) -> int:
        """The bytes that are still to come; earlier attempts may have left a part."""
        return sum(file.size - file.bytes_here(self.source.into) for file in self.files)

    def download(self) -> None:
        """Download the files, with progress on a terminal. Raises UserError."""
        mark = self.source.into / UNFINISHED
        if self.source.file is None:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        for file in self.files:
            _ask(self.source, partial(file.download, self.source.into))
        mark.unlink(missing_ok=True)


def download_weights(config: PipelineConfig, report: Callable[[str, float], None] | None = None) -> None:
    """Download the missing files of a configuration. Prints the sizes first, then shows progress.

    An interrupted download is continued. The environment variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are used.

    Args:
        report: gets the progress a few times a second, as text and as the finished share in [0, 1].

    Raises:
        UserError: a missing path that is not published, a hub that cannot be reached, or a disk that is too small.
    """
    if constants.HF_HUB_OFFLINE and all(Path(path).exists() for path in weight_paths(config)):
        log.info("download: HF_HUB_OFFLINE is set; the files that are here are used as they are")
        return
    fetches = plan_download(config)
    if not fetches:
        log.info("download: every file is here already")
        return
    for fetch in fetches:
        count, size = len(fetch.files), fetch.missing_bytes / GB
        log.info("download: %s: %d files, %.2f GB into %s", fetch.source.repository, count, size, fetch.source.into)
    _check_disk(fetches)
    with _reported(fetches, report):
        for fetch in fetches:
            fetch.download()


def plan_download(config: PipelineConfig) -> list[Fetch]:
    """Ask the hub which files of a configuration are missing here. Raises UserError as :func:`download_weights`."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise it logs every request
    return [fetch for source in _sources(config) if (fetch := _plan(source)).files]


def missing_weights(config: PipelineConfig) -> list[str]:
    """Return the paths of a configuration whose weights are not here, or whose download has not finished."""
    return [path for path in weight_paths(config) if not Path(path).exists() or _is_unfinished(path)]


def _is_unfinished(path: str) -> bool:
    source = published(path)
    return source is not None and source.file is None and (source.into / UNFINISHED).exists()


@contextmanager
def _reported(fetches: Sequence[Fetch], report: Callable[[str, float], None] | None) -> Iterator[None]:
    """Report the progress of downloads on a thread."""
    ended = threading.Event()
    total = sum(file.size for fetch in fetches for file in fetch.files)

    def watch() -> None:
        while not ended.wait(REPORT_SECONDS):
            done = total - sum(fetch.missing_bytes for fetch in fetches)
            report(f"downloading: {done / GB:.2f} of {total / GB:.2f} GB", done / max(total, 1))

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    if report is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if report is not None:
            thread.join()  # so that no report follows the end


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
