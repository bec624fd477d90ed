"""Prompts → embeddings: UMT5 (transformers) with its tokenizer, at any size.

Letters: B prompts, L tokens (= text_len), D embedding channels.
"""

import html
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.text_encoder_files import read_encoder
from model.tokenizer import build_word_tokenizer, load_transformers
from model.weights import save_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


@dataclass
class TextEncoderConfig:
    """Sizes of a UMT5 encoder that is trained from scratch."""

    dim: int = 64
    """Embedding channels D."""
    num_layers: int = 2
    """Encoder blocks."""
    num_heads: int = 4
    """Attention heads; dim is a multiple of it."""
    ffn_dim: int = 128
    """Hidden channels of the gated feed-forward layers."""
    text_len: int = 16
    """The number of tokens L to which a prompt is padded or cut, the closing token included."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")


class TextEncoder(nn.Module):
    """A UMT5 encoder with its tokenizer. Device and dtype are the model's.

    Args:
        text_len: the number of tokens L to which a prompt is padded or cut.
        input_device: the device of the token ids. It matters if the weights wait on another device until they are
            used. None is the model's device.
    """

    def __init__(
        self,
        model: "UMT5EncoderModel",
        tokenizer: "PreTrainedTokenizerFast",
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
        """Return the embeddings [B L D] of B prompts, with zeros after the end of each prompt. Differentiable.

        Prompts are cleaned first. A prompt of more than `text_len` tokens is cut, but keeps its closing token. An
        embedding does not depend on the other prompts. Without grad this is exact to the last bit, because prompts are
        encoded one at a time. With grad it is true up to rounding.
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
        """Return the embeddings [B L D] of token ids [B l], l <= L. The mask [B l] is 1 for tokens, 0 for padding."""
        embeds = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        embeds = embeds.masked_fill(mask[..., None] == 0, 0)
        return F.pad(embeds, (0, 0, 0, self.text_len - ids.shape[1]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer. Each file gets its name only when it is complete."""
        folder = Path(folder)
        config = self.model.config.to_dict() | {"architectures": [type(self.model).__name__], "text_len": self.text_len}
        state = self.model.state_dict()
        del state["encoder.embed_tokens.weight"]  # it equals shared.weight; transformers stores it once too
        save_folder(folder, state, config)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            self.tokenizer.save_pretrained(beside)
            for file in Path(beside).iterdir():
                os.replace(file, folder / file.name)

    @classmethod
    def from_files(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        input_device: torch.device | None = None,
    ) -> "TextEncoder":
        """Load a UMT5 encoder of any size and release; nothing is downloaded.

        Args:
            path: a folder written by `save_pretrained`, transformers or diffusers (also a whole pipeline or release),
                Wan2.1's models_t5_umt5-xxl-enc-bf16.pth, ComfyUI's umt5_xxl_*.safetensors, or a .gguf file.
            tokenizer: folder of the tokenizer, or a release with google/umt5-xxl. None takes the tokenizer in the
                weights or beside them. A missing folder is ignored if the weights have a tokenizer.
            text_len: tokens L of a prompt; None takes the value of config.json, else Wan's 512.
            dtype: None keeps the stored dtype, or takes bfloat16 for packed weights.
            device: None leaves the weights on the CPU. They are memory-mapped unless `dtype` converts them.
            input_device: see :class:`TextEncoder`.

        Raises:
            UserError: a file is missing or damaged, it is no UMT5 encoder, or the tokenizer has too many tokens for it.
        """
        loaded = read_encoder(path, tokenizer=tokenizer, text_len=text_len, dtype=dtype, device=device)
        return cls(*loaded, input_device=input_device)


def build_text_encoder(vocabulary: Iterable[str], config: TextEncoderConfig, *, seed: int = 0) -> TextEncoder:
    """Build an untrained encoder. Its tokenizer knows the words of `vocabulary` (words or prompts), in lower case.

    The same vocabulary, config and seed give the same encoder. All unknown words share one token. The empty prompt
    consists of the closing token only.
    """
    tokenizer = build_word_tokenizer(vocabulary)
    umt5 = load_transformers().UMT5Config(
        vocab_size=len(tokenizer),
        d_model=config.dim,
        d_kv=config.dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):  # transformers uses the global generator for initial weights
        torch.manual_seed(seed)
        model = load_transformers().UMT5EncoderModel(umt5)
    return TextEncoder(model, tokenizer, config.text_len)


def clean_prompt(prompt: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice, as many are escaped twice), and collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
