"""Prompts → embeddings: UMT5 (transformers) with its tokenizer, at any size.

Letters: B prompts, L tokens (= text_len), D embedding channels.
"""

import hashlib
import html
import logging
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.prompt_files import PromptFiles, StoredPrompt
from model.weights import (
    CONFIG_FILE,
    StateDict,
    count_layers,
    find_part,
    load_into,
    load_state_dict,
    not_found,
    read_config,
    save_folder,
    weights_hash,
)
from utils.errors import UserError
from utils.files import atomic_write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

log = logging.getLogger(__name__)

WAN_TEXT_LEN = 512


@dataclass
class TextEncoderConfig:
    """Sizes of a UMT5 encoder that is trained from scratch."""

    dim: int = 64
    """Embedding channels D."""
    num_layers: int = 2
    """Encoder blocks."""
    num_heads: int = 4
    """Attention heads; they divide dim."""
    ffn_dim: int = 128
    """Hidden channels of the gated feed-forward layers."""
    text_len: int = 16
    """Tokens L a prompt is padded or cut to, the closing one included."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")


class TextEncoder(nn.Module):
    """A UMT5 encoder with its tokenizer. Device and dtype are the model's.

    `input_device` is for a model whose weights wait elsewhere until they compute; None is where the model is.
    """

    def __init__(
        self,
        model: "UMT5EncoderModel",
        tokenizer: "PreTrainedTokenizerBase",
        text_len: int,
        *,
        input_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.input_device = input_device

    @property
    def dim(self) -> int:
        """Embedding channels D."""
        return self.model.config.d_model

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B L D] of B prompts, zero past each prompt's own length; differentiable when grad is enabled.

        Prompts are cleaned first; one longer than `text_len` tokens is cut, keeping the closing token. An embedding
        does not depend on the other prompts: up to rounding with grad, to the last bit without, where prompts are
        encoded one at a time.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"encode() takes a non-empty list of prompts, not {prompts!r}")
        if torch.is_grad_enabled():
            return self._encode_batch(prompts)
        return torch.cat([self._encode_batch([prompt]) for prompt in prompts])

    def _encode_batch(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=self.text_len,
            return_tensors="pt",
        ).to(self.input_device or self.model.device)
        return self.encode_tokens(tokens["input_ids"], tokens["attention_mask"])

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B L D] of token ids [B l] whose mask [B l] is 1 on tokens and 0 on padding, l <= L."""
        embeds = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        embeds = embeds.masked_fill(mask[..., None] == 0, 0)
        return F.pad(embeds, (0, 0, 0, self.text_len - ids.shape[1]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer's files, each renamed into place when complete."""
        folder = Path(folder)
        config = self.model.config.to_dict() | {"architectures": [type(self.model).__name__], "text_len": self.text_len}
        state = self.model.state_dict()
        del state["encoder.embed_tokens.weight"]  # tied to shared.weight, as transformers stores it too
        save_folder(folder, state, config)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            self.tokenizer.save_pretrained(beside)
            for file in Path(beside).iterdir():
                os.replace(file, folder / file.name)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        tokenizer_folder: str | Path | None = None,
        text_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "TextEncoder":
        """Load a folder written by `save_pretrained`, transformers or diffusers; the hub is never contacted.

        Args:
            folder: also a whole diffusers pipeline, for its text encoder.
            tokenizer_folder: where the tokenizer is; None looks in `folder` and, as diffusers keeps it, beside.
            text_len: tokens per prompt; None takes what config.json says, or Wan's 512.
            dtype: None keeps the stored one.
            device: None leaves the weights on the CPU, memory-mapped unless `dtype` converts them.
        """
        from transformers import UMT5Config

        folder = find_part(folder, "text_encoder")
        config = read_config(folder)
        if config.get("model_type") != "umt5":
            raise UserError(f"{folder}: config.json says model_type={config.get('model_type')!r}; 'umt5' is needed")
        stored_text_len = config.pop("text_len", WAN_TEXT_LEN)
        tokenizer = load_tokenizer(find_tokenizer(folder, tokenizer_folder))
        model = _build_umt5(
            UMT5Config.from_dict(config), load_state_dict(folder), source=str(folder), dtype=dtype, device=device
        )
        _check_vocabulary(model, tokenizer, str(folder))
        return cls(model, tokenizer, text_len or stored_text_len)

    @classmethod
    def from_wan(
        cls,
        weights_path: str | Path,
        tokenizer_folder: str | Path | None = None,
        *,
        text_len: int = WAN_TEXT_LEN,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "TextEncoder":
        """Load Wan2.1's models_t5_umt5-xxl-enc-bf16.pth (or one of any size in that format), with google/umt5-xxl.

        `tokenizer_folder` may also be the release folder that holds google/umt5-xxl; None is that of the weights.
        `dtype` and `device` as above.
        """
        state, source = load_state_dict(weights_path), str(weights_path)
        config = _infer_config(state, source)
        tokenizer = load_tokenizer(find_tokenizer(Path(weights_path), tokenizer_folder))
        model = _build_umt5(config, state, source=source, dtype=dtype, device=device)
        _check_vocabulary(model, tokenizer, source)
        return cls(model, tokenizer, text_len)


class PromptCache:
    """The embeddings of the prompts used last, for a frozen encoder: a repeated prompt is encoded once.

    Stands in for the encoder's `encode`, without gradients. What it keeps lies on the CPU without padding.

    Args:
        encoder: or what loads it, called when a prompt first needs it.
        max_prompts: how many embeddings are kept; the least used go first.
        files: embeddings of earlier runs; None keeps none.
        keep_encoder: False frees the encoder, which must be one that is loaded here, as soon as it has encoded.
        device: where embeddings go; None is where the encoder puts them.
        dtype: of the embeddings; None is that of the encoder.
    """

    def __init__(
        self,
        encoder: TextEncoder | Callable[[], TextEncoder],
        max_prompts: int = 64,
        *,
        files: PromptFiles | None = None,
        keep_encoder: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_prompts < 1:
            raise ValueError(f"max_prompts={max_prompts} must be at least 1")
        loaded = isinstance(encoder, TextEncoder)
        self._encoder = encoder if loaded else None
        self._load = None if loaded else encoder
        self.max_prompts = max_prompts
        self.files = files
        self.keep_encoder = keep_encoder
        self.device = device
        self.dtype = dtype
        self._prompts: OrderedDict[str, StoredPrompt] = OrderedDict()  # oldest use first

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B L D] of B prompts."""
        return torch.stack(
            [
                F.pad(
                    stored.embeds.to(device=self.device, dtype=self.dtype),
                    (0, 0, 0, stored.text_len - len(stored.embeds)),
                )
                for stored in self._recall(prompts)
            ]
        )

    def load(self) -> None:
        """Load the encoder now, so that the first prompt need not wait for it."""
        if self._encoder is None:
            self._encoder = self._load()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts that are needed later, however many, while the encoder may take all the memory."""
        self.max_prompts = max(self.max_prompts, len(prompts))
        for _ in self._recall(prompts):
            pass

    @torch.no_grad()
    def _recall(self, prompts: Sequence[str]) -> list[StoredPrompt]:
        stored = [self._recall_one(clean_prompt(prompt)) for prompt in prompts]
        if not self.keep_encoder:
            self._encoder = None
        return stored

    def _recall_one(self, prompt: str) -> StoredPrompt:
        stored = self._prompts.pop(prompt, None)
        if stored is None and self.files is not None:
            stored = self.files.read(prompt)
        if stored is None:
            stored = self._encode(prompt)
            if self.files is not None:
                self.files.write(prompt, stored)
        self._prompts[prompt] = stored
        if len(self._prompts) > self.max_prompts:
            self._prompts.popitem(last=False)
        return stored

    def _encode(self, prompt: str) -> StoredPrompt:
        self.load()
        embeds = self._encoder.encode([prompt])[0]
        if self.device is None:
            self.device = embeds.device
        tokens = int(embeds.any(dim=-1).nonzero().max()) + 1
        return StoredPrompt(embeds[:tokens].cpu().clone(), len(embeds))


def open_prompt_files(
    folder: str | Path, weights: str | Path, tokenizer_folder: str | Path | None, dtype: torch.dtype
) -> PromptFiles | None:
    """The prompts that an encoder has stored in `folder`; None for one that is not there and never was.

    Embeddings belong to all that decides them: weights, tokenizer, config.json and dtype, by a hash. It is remembered
    under the encoder's path, so that an encoder may be deleted once its prompts are stored.
    """
    folder = Path(folder).expanduser()
    place = f"{Path(weights).absolute()}\n{tokenizer_folder}\n{dtype}"
    memory = folder / f"{hashlib.sha256(place.encode()).hexdigest()[:40]}.encoder"
    if not Path(weights).exists():
        return PromptFiles(folder, memory.read_text()) if memory.is_file() else None
    digest = encoder_digest(weights, tokenizer_folder, dtype)
    try:
        atomic_write_text(memory, digest)
    except OSError as error:
        log.warning("%s: %s; prompt embeddings are not kept", folder, error.strerror or error)
        return None
    return PromptFiles(folder, digest)


def encoder_digest(weights: str | Path, tokenizer_folder: str | Path | None, dtype: torch.dtype) -> str:
    """Return a hash of all that decides an encoder's embeddings: weights, tokenizer, config.json and dtype."""
    source = find_part(weights, "text_encoder")
    digest = hashlib.sha256(f"{weights_hash(source)}\n{dtype}".encode())
    for file in (_tokenizer_file(find_tokenizer(source, tokenizer_folder)), source / CONFIG_FILE):
        if file is not None and file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def build_text_encoder(vocabulary: Iterable[str], config: TextEncoderConfig, *, seed: int = 0) -> TextEncoder:
    """An untrained encoder whose tokenizer knows the words of `vocabulary` (words or whole prompts), in lower case.

    The same vocabulary, config and seed give the same encoder. Words it does not know share one token; the empty
    prompt is the closing token alone.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _build_word_tokenizer(vocabulary)
    umt5 = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=config.dim,
        d_kv=config.dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(seed)
        model = UMT5EncoderModel(umt5)
    return TextEncoder(model, tokenizer, config.text_len)


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, resolve HTML entities (twice: they are often escaped twice), collapse white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


# tokenizer.json says everything, whichever class and transformers version wrote it; the rest is looked up by name.
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def find_tokenizer(weights: Path, folder: str | Path | None = None) -> Path:
    """Where an encoder's tokenizer is: in `folder`, or in its part of a release; else with the weights or beside."""
    if folder is not None:
        return find_part(folder, "tokenizer")
    beside = find_part(weights.parent, "tokenizer")
    return weights if weights.is_dir() and (beside == weights.parent or _tokenizer_file(weights)) else beside


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a local folder; UserError when there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(folder).exists():
        raise not_found(folder)
    file = _tokenizer_file(folder)
    if file is None:
        raise UserError(f"{folder}: holds no tokenizer (neither {' nor '.join(TOKENIZER_FILES)})")
    reader = PreTrainedTokenizerFast if file.suffix == ".json" else AutoTokenizer
    try:
        return reader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and the Rust tokenizer raise bare Exceptions on damaged files
        raise UserError(f"{folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None


def _tokenizer_file(folder: str | Path) -> Path | None:
    return next((Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()), None)


def _build_word_tokenizer(vocabulary: Iterable[str]) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("<pad>", "</s>", "<unk>")  # 0, 1, 2 as in T5
    splitter = pre_tokenizers.Whitespace()
    words = {word for text in vocabulary for word, _ in splitter.pre_tokenize_str(text.lower())}
    ids = {word: number for number, word in enumerate([*specials, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    pad, eos, unk = specials
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)


def _check_vocabulary(model: "UMT5EncoderModel", tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """Raise UserError where the tokenizer has ids that the model has no embedding of."""
    rows, ids = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if ids > rows:
        raise UserError(f"{source}: has embeddings of {rows} tokens, the tokenizer has {ids}; use its own tokenizer")


def _build_umt5(
    config: "UMT5Config",
    state: StateDict,
    *,
    source: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None = None,
) -> "UMT5EncoderModel":
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    if "shared.weight" in state:  # files hold the tied embedding once
        state["shared.weight"] = state["encoder.embed_tokens.weight"] = state["shared.weight"].to(device, dtype)
    load_into(model, state, source=source, dtype=dtype, device=device)
    model.set_input_embeddings(model.shared)  # assigning has untied the two
    return model.eval()


def _infer_config(state: Mapping[str, Tensor], source: str) -> "UMT5Config":
    """A UMT5Config read off the shapes of tensors under transformers' names."""
    from transformers import UMT5Config

    first = "encoder.block.0.layer"
    names = (
        "shared.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    if absent := [name for name in names if name not in state]:
        raise UserError(f"{source}: not a UMT5 encoder: it has no tensor for {absent[0]!r}")
    if wrong := [name for name in names if state[name].ndim != 2]:
        raise UserError(f"{source}: not a UMT5 encoder: {wrong[0]!r} is {tuple(state[wrong[0]].shape)}")
    (vocab_size, dim), (inner, _), (buckets, heads), (ffn, _) = (state[name].shape for name in names)
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn,
        num_layers=count_layers(state, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        dropout_rate=0.0,
    )
