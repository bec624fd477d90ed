"""The embeddings of prompts, kept in memory and on disk: a repeated prompt is encoded once.

Letters: B prompts, L tokens (= text_len), l tokens of one prompt, D embedding channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.prompt_files import PromptFiles, StoredPrompt
from model.text_encoder import TextEncoder, clean_prompt


class PromptCache:
    """Stores the embeddings of the most recent prompts of a frozen encoder.

    Its `encode` is that of the encoder, without gradients. It stores embeddings on the CPU, without padding.

    Args:
        encoder: an encoder, or a function that loads one when a prompt first needs it.
        max_prompts: how many embeddings are stored. The least recently used ones are dropped first.
        files: embeddings of earlier runs. None: no files are read or written.
        keep_encoder: False frees the encoder as soon as it has encoded. `encoder` must then be a function.
        device: the device of the embeddings; None is the encoder's output device.
        dtype: the type of the embeddings; None is the encoder's.
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
        self._prompts: OrderedDict[str, StoredPrompt] = OrderedDict()  # least recently used first

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [B L D] of B prompts."""
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
        """Load the encoder now, so that the first prompt does not wait for it."""
        if self._encoder is None:
            self._encoder = self._load()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode any number of prompts before they are needed, while the encoder may use all the memory."""
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
