"""Check a run before anything heavy loads: refuse what cannot work, and warn of doubtful prompts."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer

from model.text_encoder import clean_prompt
from model.text_encoder_files import read_text_len
from model.tokenizer import find_tokenizer, parse_tokenizer, tokenizer_bytes
from model.weights import find_part, not_found
from pipeline.config import PipelineConfig, Sampler, TextConfig
from pipeline.inference.options import InferenceOptions
from pipeline.loading import needs_text_encoder
from pipeline.sizes import token_size
from utils.errors import UserError
from utils.shapes import all_scenes, is_shapes_prompt, shapes_words

log = logging.getLogger("inference")

UNKNOWN = "<unk>"
SMALL_TOKENIZER = 2**20  # bytes
LISTED_WORDS = 60


def fit_length(config: PipelineConfig, options: InferenceOptions) -> PipelineConfig:
    """Return the configuration with room for a first image, unless the command line chooses a length.

    Raises:
        UserError: the length does not divide into chunks, or the sampler cannot start a video as asked.
    """
    starts = options.given("i2v", "extend", "v2v")
    if options.v2v and config.sampler is not Sampler.rollout:
        raise UserError(f"--v2v cannot be used with sampler={config.sampler.value}; use sampler=rollout")
    if config.sampler is Sampler.many_step:
        if starts:
            raise UserError(f"{starts[0]} cannot be used with sampler=many_step; use a causal generator")
        return config  # this sampler has no chunks
    if options.i2v and not options.length_chosen and not config.rollout.independent_first_frame:
        config = replace(config, video=replace(config.video, num_frames=config.video.num_frames + 1))
    _check_chunks(config, options)
    return config


def _check_chunks(config: PipelineConfig, options: InferenceOptions) -> None:
    rollout, frames = config.rollout, config.video.num_frames - options.i2v
    given = int(options.i2v or options.extend is not None)
    first = int(rollout.independent_first_frame and not given)
    if frames > first and (frames - first) % rollout.frames_per_chunk == 0:
        return  # checked without the list of chunks, which would be huge for a mistyped length
    try:
        rollout.chunks(frames, given)
    except ValueError as error:
        image = ", and 1 for the image" if options.i2v else ""
        raise UserError(f"video.num_frames={config.video.num_frames} (--num_output_frames): {error}{image}") from None


def check_weights(config: PipelineConfig, prompts: Sequence[str], dtype: torch.dtype) -> None:
    """Raise UserError if weights are missing or cannot make videos of the configured size.

    The text encoder may be missing if the embeddings of all prompts are on disk.
    """
    for key, section in (
        ("generator", config.generator),
        ("text_encoder", config.text_encoder),
        ("codec", config.codec),
    ):
        if section.weights is None:
            raise UserError(f"{key}.weights is null; give the path of a file or folder of weights")
        stored = key == "text_encoder" and not needs_text_encoder(config, prompts, dtype)
        if not stored and not Path(section.weights).exists():
            raise not_found(section.weights)
    rows, columns = token_size(config)
    height, width = config.video.height, config.video.width
    if height % rows or width % columns:
        raise UserError(f"video.height={height}, video.width={width}: must be multiples of {rows} and {columns}")


def warn_of_prompts(config: TextConfig, prompts: Sequence[str]) -> None:
    """Log one warning of prompts that are too long for the text encoder, and one of words that it does not know."""
    source = find_part(config.weights, "text_encoder")
    place = find_tokenizer(source, config.tokenizer)
    data = tokenizer_bytes(place) if source.exists() and place.exists() else None
    if data is None:
        return
    length = read_text_len(source)
    long = any(len(prompt.encode()) + 2 > length for prompt in prompts)  # a token is at least one byte
    if long or len(data) < SMALL_TOKENIZER:  # reading a large one takes a second
        warn_of_long_and_unknown(parse_tokenizer(data, str(place)), prompts, length)


def warn_of_long_and_unknown(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> None:
    """Log the warnings of :func:`warn_of_prompts`."""
    unknown: dict[str, None] = {}
    other_forms: list[str] = []
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
    shapes = bool(words) and set(words) <= shapes_words()
    for prompt in prompts:
        text = clean_prompt(prompt)
        encoding = tokenizer.encode(text)
        if len(encoding.ids) > length:
            log.warning(
                "the prompt %r has %d tokens; the model reads the first %d", _shorten(prompt), len(encoding.ids), length
            )
        new = _unknown_words(text, encoding)
        unknown |= dict.fromkeys(new)
        if shapes and not new and not is_shapes_prompt(text):
            other_forms.append(prompt)
    if unknown:
        known = f"; it knows: {', '.join(words)}" if len(words) <= LISTED_WORDS else ""
        log.warning("the model does not know: %s%s", ", ".join(map(_shorten, list(unknown)[:LISTED_WORDS])), known)
    if other_forms:
        example, number = all_scenes()[0].prompt, len(other_forms)
        log.warning("%d of the prompts, such as %r, %s not have the form that the Shapes model knows; write it like %r",
                    number, _shorten(other_forms[0]), "does" if number == 1 else "do", example)  # fmt: skip


def _unknown_words(text: str, encoding: Encoding) -> list[str]:
    """Return the words of `text`, without punctuation, that the tokenizer does not know."""
    words = (text[start:end] for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)
             if token == UNKNOWN)  # fmt: skip
    return [word for word in words if not all(unicodedata.category(c).startswith("P") for c in word)]


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
