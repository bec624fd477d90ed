"""Prompts → embeddings: UMT5 (transformers) with its tokenizer, at any size.

Letters: B prompts, L tokens (= text_len), D embedding channels.
"""

import html
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.weights import (
    StateDict,
    count_layers,
    find_part,
    load_into,
    load_state_dict,
    not_found,
    read_config,
    save_folder,
)
from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

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
    """A UMT5 encoder with its tokenizer. Device and dtype are the model's."""

    def __init__(self, model: "UMT5EncoderModel", tokenizer: "PreTrainedTokenizerBase", text_len: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len

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
        ).to(self.model.device)
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
    ) -> "TextEncoder":
        """Load a folder written by `save_pretrained`, transformers or diffusers; the hub is never contacted.

        Args:
            folder: also a whole diffusers pipeline, for its text encoder.
            tokenizer_folder: where the tokenizer is; None looks in `folder` and, as diffusers keeps it, beside.
            text_len: tokens per prompt; None takes what config.json says, or Wan's 512.
            dtype: None keeps the stored one.
        """
        from transformers import UMT5Config

        folder = find_part(folder, "text_encoder")
        config = read_config(folder)
        if config.get("model_type") != "umt5":
            raise UserError(f"{folder}: config.json says model_type={config.get('model_type')!r}; 'umt5' is needed")
        stored_text_len = config.pop("text_len", WAN_TEXT_LEN)
        model = _build_umt5(UMT5Config.from_dict(config), load_state_dict(folder), source=str(folder), dtype=dtype)
        beside = find_part(folder.parent, "tokenizer")
        if tokenizer_folder is None:
            tokenizer_folder = folder if beside == folder.parent or _tokenizer_file(folder) else beside
        return cls(model, load_tokenizer(tokenizer_folder), text_len or stored_text_len)

    @classmethod
    def from_wan(
        cls,
        weights_path: str | Path,
        tokenizer_folder: str | Path,
        *,
        text_len: int = WAN_TEXT_LEN,
        dtype: torch.dtype | None = None,
    ) -> "TextEncoder":
        """Load Wan2.1's models_t5_umt5-xxl-enc-bf16.pth (or one of any size in that format), with google/umt5-xxl.

        `tokenizer_folder` may also be the release folder that holds google/umt5-xxl.
        """
        state = load_state_dict(weights_path)
        model = _build_umt5(_infer_config(state, str(weights_path)), state, source=str(weights_path), dtype=dtype)
        return cls(model, load_tokenizer(find_part(tokenizer_folder, "tokenizer")), text_len)


class PromptCache:
    """The embeddings of the prompts used last, for a frozen encoder: a repeated prompt is encoded once.

    Stands in for the encoder (`encode`, `dim`, `text_len`), without gradients.
    """

    def __init__(self, encoder: TextEncoder, max_prompts: int = 64) -> None:
        if max_prompts < 1:
            raise ValueError(f"max_prompts={max_prompts} must be at least 1")
        self.encoder = encoder
        self.max_prompts = max_prompts
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()  # oldest use first

    @property
    def dim(self) -> int:
        """Embedding channels D."""
        return self.encoder.dim

    @property
    def text_len(self) -> int:
        """Tokens L per prompt."""
        return self.encoder.text_len

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B L D] of B prompts."""
        return torch.stack([self._encode_one(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Tensor:
        embeds = self._embeds.pop(prompt, None)
        self._embeds[prompt] = self.encoder.encode([prompt])[0] if embeds is None else embeds
        if len(self._embeds) > self.max_prompts:
            self._embeds.popitem(last=False)
        return self._embeds[prompt]


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


def _build_umt5(
    config: "UMT5Config", state: StateDict, *, source: str, dtype: torch.dtype | None
) -> "UMT5EncoderModel":
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    if "shared.weight" in state:  # files hold the tied embedding once
        state["shared.weight"] = state["encoder.embed_tokens.weight"] = state["shared.weight"].to(dtype)
    load_into(model, state, source=source, dtype=dtype)
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
