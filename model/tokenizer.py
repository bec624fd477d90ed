"""Tokenizers of the text encoder: finds their files, reads them without running code, or builds one of whole words.

Only the file of the vocabulary and the names of its special tokens are used. Other settings could name code to run, or
ask for a million extra tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from model.weights import find_part, not_found
from model.weights.read import TOKENIZER_TENSOR, read_file
from utils.errors import UserError
from utils.patterns import check_pattern
from utils.side_files import parse_json, read_json, read_limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

JSON_FILE, PIECES_FILE, SETTINGS_FILE = "tokenizer.json", "spiece.model", "tokenizer_config.json"
TOKENIZER_FILES = (JSON_FILE, PIECES_FILE)  # the first is complete, for every class and version that wrote it
TOKENIZER_ENDINGS = {Path(name).suffix for name in TOKENIZER_FILES}
MAX_BYTES = 64 * 2**20  # UMT5's tokenizer.json has 17 MB
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # T5's names


@dataclass
class SpecialTokens:
    """The names of special tokens in tokenizer_config.json."""

    pad_token: str | dict[str, Any] | None = PAD
    """The token that fills short prompts, as a name or as an object with its `content`."""
    eos_token: str | dict[str, Any] | None = END
    """The closing token."""
    unk_token: str | dict[str, Any] | None = UNKNOWN
    """The token of unknown words."""

    def names(self) -> dict[str, str]:
        """Return the stated names as plain text."""
        plain = {key: value.get("content") if isinstance(value, dict) else value for key, value in vars(self).items()}
        return {key: value for key, value in plain.items() if isinstance(value, str)}


def find_tokenizer(weights: Path, folder: str | Path | None = None) -> Path:
    """Return the path of an encoder's tokenizer.

    Args:
        weights: the encoder's folder or file.
        folder: the tokenizer's folder or file, or a release that has one. None takes the tokenizer in the weights,
            with them or beside them. A missing folder is ignored if the weights have a tokenizer.
    """
    if folder is not None and (Path(folder).exists() or not _holds_tokenizer(weights)):
        return find_part(folder, "tokenizer")
    if _holds_tokenizer(weights):
        return weights
    beside = find_part(weights.parent, "tokenizer")
    return weights if weights.is_dir() and beside == weights.parent else beside


def tokenizer_bytes(path: str | Path) -> bytes | None:
    """Return the bytes of the vocabulary: of a folder, of a tokenizer's file, or in a file of weights.

    None if there is none.
    """
    path = Path(path)
    file = _tokenizer_file(path) if path.is_dir() else path
    if path.is_dir() or path.suffix.lower() in TOKENIZER_ENDINGS:
        return None if file is None else read_limited(file, MAX_BYTES)
    tensor = read_file(path).get(TOKENIZER_TENSOR)
    if tensor is None:
        return None
    if tensor.numel() > MAX_BYTES or tensor.dtype.itemsize != 1:
        raise UserError(f"{path}: its tensor {TOKENIZER_TENSOR!r} does not hold a tokenizer; use other weights")
    return tensor.flatten().numpy().tobytes()


def load_transformers() -> ModuleType:
    """Import transformers. It takes seconds, and a run whose prompts are all in the cache does not need it."""
    import transformers

    return transformers


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local folder or file, or inside the file of a repackaged text encoder.

    Raises:
        UserError: the tokenizer is missing, damaged, or has a pattern that could take very long to match.
    """
    path = Path(path)
    if not path.exists():
        raise not_found(path)
    data = tokenizer_bytes(path)
    if data is None:
        raise UserError(f"{path}: holds no tokenizer (neither {' nor '.join(TOKENIZER_FILES)}); name another folder")
    settings = path / SETTINGS_FILE
    names = (read_json(settings, SpecialTokens) if settings.is_file() else SpecialTokens()).names()
    tokenizer = parse_tokenizer(data, str(path))
    names = {key: name for key, name in names.items() if tokenizer.token_to_id(name) is not None}
    return load_transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def parse_tokenizer(data: bytes, source: str) -> Tokenizer:
    """Make a tokenizer without padding and truncation, from a tokenizer.json or a sentencepiece model.

    Raises:
        UserError: the bytes are damaged, or have a pattern that could take very long to match. It names `source`.
    """
    try:
        return _from_json(data, source) if data.lstrip()[:1] == b"{" else _from_pieces(data)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library panics on some damaged files, with its own class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: its tokenizer cannot be read ({reason[:200]}); download it again") from None


def build_word_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words in lower case. All unknown words share one token."""
    splitter = pre_tokenizers.Whitespace()
    words = {word for text in vocabulary for word, _ in splitter.pre_tokenize_str(text.lower())}
    ids = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = _closing(ids[END])
    return load_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def _holds_tokenizer(weights: Path) -> bool:
    """Return whether weights have their own tokenizer, in their folder or in their file."""
    if weights.is_dir():
        return _tokenizer_file(weights) is not None
    return weights.is_file() and TOKENIZER_TENSOR in read_file(weights)


def _tokenizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _from_json(data: bytes, source: str) -> Tokenizer:
    content = parse_json(data, dict, f"{source}/{JSON_FILE}")
    for pattern in _patterns(content):
        check_pattern(pattern, f"{source}/{JSON_FILE}")
    tokenizer = Tokenizer.from_str(data.decode("utf-8-sig"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _patterns(value: Any) -> Iterator[str]:
    """Yield the regular expressions in a tokenizer.json. The large vocabulary has none, so it is skipped."""
    if isinstance(value, list):
        for item in value:
            yield from _patterns(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "Regex" and isinstance(item, str):
                yield item
            elif key != "vocab":
                yield from _patterns(item)


def _from_pieces(data: bytes) -> Tokenizer:
    """Convert a sentencepiece model to a tokenizer of the `tokenizers` library. Both give the same ids."""
    pieces = SentencePieceProcessor(model_proto=data)
    vocabulary = [(pieces.id_to_piece(number), pieces.get_score(number)) for number in range(len(pieces))]
    tokenizer = Tokenizer(
        models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=any(map(pieces.is_byte, range(len(pieces)))))
    )
    steps = [normalizers.Replace(Regex(" {2,}"), " ")]
    if charsmap := _normalisation(data):
        steps.insert(0, normalizers.Precompiled(charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = _closing(pieces.eos_id(), pieces.id_to_piece(pieces.eos_id()))
    tokenizer.add_special_tokens([vocabulary[number][0] for number in range(len(pieces)) if pieces.is_control(number)])
    return tokenizer


def _closing(number: int, name: str = END) -> Any:
    """Return the step that appends the closing token."""
    return processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, number)])


def _normalisation(data: bytes) -> bytes:
    """Return the table of character replacements: field 2 of field 3 (normalizer_spec) of the ModelProto."""
    return dict(_fields(dict(_fields(data)).get(3, b""))).get(2, b"")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of those fields of a protobuf message that have a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 2:
            length, at = _varint(data, at)
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind == 0:
            _, at = _varint(data, at)
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128 or shift > 63:
            return value, at
