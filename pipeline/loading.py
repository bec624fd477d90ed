"""Loads the parts that a configuration names: denoisers, codecs and text encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.layers import SelfAttention
from model.prompt_cache import PromptCache
from model.prompt_files import PromptFiles, open_prompt_files
from model.text_encoder import TextEncoder, clean_prompt
from model.tiling import TileConfig
from model.tiny_vae import TinyVAE
from model.transformer import PRESETS, WanTransformer
from model.wan_vae import WanVAE
from model.weights import load_state_dict, not_found, weights_hash
from model.weights.lora import merge_loras
from model.weights.lora_choice import load_loras, loras_hash
from model.weights.transformer_read import read_transformer
from pipeline.config import CodecConfig, CodecKind, DenoiserConfig, PipelineConfig, TextConfig
from utils.errors import UserError

log = logging.getLogger(__name__)


def load_transformer(
    config: DenoiserConfig,
    *,
    use_ema: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    generator: torch.Generator | None = None,
    streamed: bool = False,
) -> WanTransformer:
    """Build a transformer from its weights and its LoRA. Without weights, random ones are drawn from ``generator``.

    Args:
        use_ema: see :meth:`DenoiserConfig.average`.
        dtype: the dtype of the weights; None keeps the stored one.
        streamed: keep the weights of the blocks in RAM (see :func:`stream_weights`). For inference only.

    Raises:
        UserError: the weights are missing, damaged or of other sizes.
    """
    use_ema = config.average(use_ema)
    loras = load_loras(config.lora, config.lora_scale)  # first, so that a mistake shows before the large files are read
    if config.weights is None:
        model = _random_transformer(config.preset, generator).to(device, dtype)
    else:
        place = {"device": device, "dtype": dtype}
        if streamed:
            place = {"dtype": waiting_dtype(torch.device(device), dtype)}
        model = read_transformer(config.weights, preset=config.preset, use_ema=use_ema, **place)
    merge_loras(dict(model.named_parameters()), loras)
    if streamed:
        _stream_blocks(model, device, dtype)
    model.run_with(gradient_checkpointing=config.gradient_checkpointing, attention=config.attention)
    return model


def _random_transformer(preset: str, generator: torch.Generator | None) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(PRESETS[preset])
    model.to_empty(device="cpu")
    model.reset_parameters(generator)
    return model


def _stream_blocks(model: WanTransformer, device: torch.device | str, dtype: torch.dtype) -> None:
    """Leave the weights of the blocks where they are, and move all other weights to the device."""
    for name, part in model.named_children():
        if name != "blocks":
            part.to(device, dtype)
    for block in model.blocks:
        stream_weights(block, device, dtype)


def waiting_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of streamed weights while they wait. On a CPU it is the stored one (None), as in their file."""
    return None if device.type == "cpu" else dtype


def stream_weights(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Leave the weights of a module where they are. A layer's weights are on ``device`` only while it computes.

    They are converted to ``dtype`` there. Self-attention reads the weights of its parts directly (see
    :meth:`SelfAttention.fuse`), so all of them are moved together.
    """
    from accelerate import cpu_offload

    cpu_offload(
        module.requires_grad_(False),
        execution_device=torch.device(device),
        state_dict=module.state_dict(),
        preload_module_classes=[SelfAttention.__name__],
    )
    module.to(dtype)  # parameters have no values now; this sets the dtype to which weights are converted


def generator_hash(config: DenoiserConfig, *, use_ema: bool | None = None) -> str:
    """Return the identity of a generator: the hash of its stored weights, then the scale and hash of each LoRA."""
    digest = weights_hash(load_state_dict(config.weights, use_ema=use_ema))
    return f"{digest}{loras_hash(load_loras(config.lora, config.lora_scale))}"


def load_denoiser(config: DenoiserConfig, **options) -> Denoiser:
    """Load a :class:`Denoiser` with :func:`load_transformer`."""
    return Denoiser(load_transformer(config, **options), FlowMatching(config.shift))


def load_codec(
    config: CodecConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiled: bool = False,
) -> VideoCodec:
    """Load the video codec, frozen. ``tiled``: the Wan VAE decodes in tiles. A TinyVAE does not need tiles."""
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    if config.kind is CodecKind.wan:
        codec = WanVAE.from_file(path, tiling=TileConfig() if tiled else None)
    else:
        codec = TinyVAE.from_pretrained(path) if path.is_dir() else TinyVAE.from_file(path)
    return codec.to(device, dtype).eval().requires_grad_(False)


def load_text_encoder(
    config: TextConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    streamed: bool = False,
) -> TextEncoder:
    """Load the text encoder with its tokenizer, frozen. ``streamed``: see :func:`stream_weights`."""
    if config.weights is None:
        raise UserError("text_encoder.weights is null; name a text-encoder folder or Wan's .pth file")
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    device = torch.device(device)
    if streamed:
        where = {"dtype": waiting_dtype(device, dtype), "input_device": device}
    else:
        where = {"dtype": dtype, "device": device}
    encoder = TextEncoder.from_files(path, tokenizer=config.tokenizer, **where)
    if streamed:
        stream_weights(encoder.model.encoder, device, dtype)  # the rest is the shared embedding
    return encoder.eval().requires_grad_(False)


def stored_prompts(config: TextConfig, dtype: torch.dtype) -> PromptFiles | None:
    """Return the embeddings that earlier runs with this text encoder stored on disk. None if nothing is stored."""
    if config.cache is None or config.weights is None:
        return None
    return open_prompt_files(config.cache, config.weights, config.tokenizer, dtype)


def needs_text_encoder(config: PipelineConfig, prompts: Sequence[str], dtype: torch.dtype) -> bool:
    """Return whether the embedding of any prompt of these videos is missing on disk."""
    files = stored_prompts(config.text_encoder, dtype)
    return files is None or not all(files.holds(clean_prompt(prompt)) for prompt in config.prompts_to_embed(prompts))


def load_prompt_cache(
    config: TextConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    streamed: bool = False,
    keep_encoder: bool = True,
) -> PromptCache:
    """Make the cache of embeddings. It loads the text encoder when a prompt first needs it."""
    return PromptCache(
        lambda: load_text_encoder(config, device=device, dtype=dtype, streamed=streamed),
        files=stored_prompts(config, dtype),
        keep_encoder=keep_encoder,
        device=device,
    )
