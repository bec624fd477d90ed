"""Reads prompt files: text with one prompt a line, JSON lines, and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

HUB_DOWNLOAD = "hf download gdhe17/Self-Forcing {name} --local-dir {folder}"
GITHUB_DOWNLOAD = (
    "curl -L --create-dirs -o {path} https://raw.githubusercontent.com/guandeh17/Self-Forcing/main/prompts/{name}"
)
# Published prompt files: name → the command that downloads them.
DOWNLOADS = {
    "vidprom_filtered_extended.txt": HUB_DOWNLOAD,
    "vidprom_filtered_extended_switch.txt": (
        "hf download Efficient-Large-Model/LongLive-1.3B prompts/{name} --local-dir {folder}/.."
    ),
    "MovieGenVideoBench_extended.txt": GITHUB_DOWNLOAD,
}
LINE_END = re.compile(r"\r\n|\n|\r")
PROMPT_COLUMN = "prompt"
MAX_BYTES = 2**30


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file."""

    number: int
    """The line of the file, from 1. In a CSV file, the record, without the header."""
    prompt: str
    image: Path | None = None
    """The first image of the video, if the file names images."""


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file in order; see :func:`read_prompt_lines`."""
    return [line.prompt for line in read_prompt_lines(path)]


def read_prompt_lines(path: str | Path) -> list[PromptLine]:
    r"""Return the prompts of a UTF-8 file in order, with their line numbers. Empty lines are ignored.

    The ending of the name decides how it is read: `.jsonl` holds one JSON object a line and `.csv` (or `.tsv`) a
    header, both with a column "prompt". Any other file holds one prompt a line. Only `\n`, `\r\n` and `\r` end a line;
    other separators and control characters within a prompt become spaces.

    Raises:
        UserError: the file is missing, not text, holds no prompt, or has a line without a prompt; names the line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in UNREADABLE:
        raise UserError(f"{path}: a {suffix} file cannot be read as prompts; give a .txt, .jsonl or .csv file")
    text = _read_text(path)
    numbered = READERS.get(suffix, _text_lines)(text, path)
    lines = [PromptLine(number, one_line(prompt)) for number, prompt in numbered]
    lines = [line for line in lines if line.prompt]
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return lines


def read_image_prompts(path: str | Path) -> tuple[list[Path], list[str]]:
    """Return the images and the prompts of a file; see :func:`read_image_lines`."""
    lines = read_image_lines(path)
    return [line.image for line in lines], [line.prompt for line in lines]


def read_image_lines(path: str | Path) -> list[PromptLine]:
    """Return the lines of a JSON-lines file ``{"image": "first.png", "prompt": "..."}``; paths are relative to it.

    Raises:
        UserError: names the line that is not such an object or whose image is missing.
    """
    path = Path(path)
    lines = []
    for number, entry in read_entries(path, needs=("image", PROMPT_COLUMN)):
        image = path.parent / entry["image"]
        if not _is_file(image):
            raise UserError(f"{path}, line {number}: image {image} not found")
        lines.append(PromptLine(number, one_line(entry[PROMPT_COLUMN]), image))
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return lines


def read_entries(path: str | Path, *, needs: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the objects of a JSON-lines file with their line numbers; each has text under every key in `needs`.

    Raises:
        UserError: names the file if it is missing or not text, and the line if it is not such an object.
    """
    path = Path(path)
    yield from _json_lines(_read_text(path), path, needs=needs)


def pair_prompts(names: Sequence[PromptLine], source: str, path: str | Path) -> list[str]:
    """Return for each of `names` the prompt on the same line of the file `path`.

    Args:
        names: the prompts that the videos are named after.
        source: the origin of `names`, for error messages.
        path: the file with the longer prompts.

    Raises:
        UserError: a line of one has no counterpart in the other; names both lines.
    """
    others = {line.number: line.prompt for line in read_prompt_lines(path)}
    own = {line.number: line.prompt for line in names}
    for number in sorted(own.keys() ^ others.keys()):
        holder, lacking = (source, path) if number in own else (path, source)
        text = own.get(number) or others[number]
        raise UserError(
            f"{lacking}, line {number}: holds no prompt, but {holder}, line {number}, is {_shorten(text)!r}; "
            "the two files are paired line by line"
        )
    return [others[line.number] for line in names]


def one_line(prompt: str) -> str:
    """Return a prompt without line ends, other separators and control characters; each becomes a space."""
    clean = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in prompt)
    return "".join(clean).strip()


def _text_lines(text: str, path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(LINE_END.split(text), start=1)


def _json_prompts(text: str, path: Path) -> Iterator[tuple[int, str]]:
    for number, entry in _json_lines(text, path, needs=(PROMPT_COLUMN,)):
        yield number, entry[PROMPT_COLUMN]


def _json_lines(text: str, path: Path, *, needs: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the objects of JSON lines with their numbers; each has the keys in `needs`, with text in them."""
    example = ", ".join(f'"{key}": ...' for key in needs)
    for number, line in _text_lines(text, path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            valid = all(isinstance(entry[key], str) and entry[key].strip() for key in needs)
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid:
            raise UserError(f"{path}, line {number}: is not {{{example}}}")
        yield number, entry


def _csv_prompts(text: str, path: Path) -> Iterator[tuple[int, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = {name.strip().lower(): name for name in reader.fieldnames or []}
        if PROMPT_COLUMN not in columns:
            raise UserError(
                f"{path}: has no column {PROMPT_COLUMN!r} (its columns: {_shorten(', '.join(columns))}); "
                "give one of them this name"
            )
        for number, row in enumerate(reader, start=1):
            prompt = (row[columns[PROMPT_COLUMN]] or "").strip()
            if not prompt and any(row.values()):
                raise UserError(f"{path}, record {number}: has no prompt; write one or take the record out")
            yield number, prompt
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is not CSV ({error})") from None


READERS: dict[str, Callable[[str, Path], Iterator[tuple[int, str]]]] = {
    ".jsonl": _json_prompts,
    ".csv": _csv_prompts,
    ".tsv": _csv_prompts,
}
UNREADABLE = (
    *(".json", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm"),
    *(".parquet", ".arrow", ".xlsx", ".xls", ".ods", ".docx", ".doc", ".odt", ".rtf", ".pdf", ".zip", ".gz"),
)


def _read_text(path: Path) -> str:
    if not _is_file(path):
        raise UserError(f"{_shorten(str(path))}: no such prompt file{_remedy(path)}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path}: has {size} bytes; a prompt file has at most {MAX_BYTES}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _remedy(path: Path) -> str:
    if path.name not in DOWNLOADS:
        return ""
    return f"; download it: {DOWNLOADS[path.name].format(path=path, name=path.name, folder=path.parent)}"


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
