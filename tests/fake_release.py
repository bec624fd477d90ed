"""A complete fake release: every file has the real format, layout and key names, with tiny random weights.

A test proves the map from diffusers' names to those of Wan2.1_VAE.pth: diffusers' own converter must undo it.
"""

import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TinyVAEConfig
from model.transformer import WanConfig, WanTransformer
from model.weights import WAN_T5_TO_TRANSFORMERS, rename_keys
from model.weights.transformer_write import write_transformer
from tests.made_once import made_once

State = dict[str, Tensor]

# Widths are multiples of 128, because heads are assumed to be 128 wide if there is no config.json.
SMALL = WanConfig(dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=32, freq_dim=64)
LARGE = WanConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=3, text_dim=32, freq_dim=64)
TAEHV = TinyVAEConfig(encoder_widths=(8, 8, 8, 8), decoder_widths=(16, 12, 8, 8))
VAE_BASE_DIM = 8
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
WAN_FILE = "diffusion_pytorch_model.safetensors"
SENTENCES = [
    "A stylish woman walks down a street in Tokyo filled with warm glowing neon.",
    "A large orange octopus rests on the bottom of the ocean floor.",
    "Several giant woolly mammoths approach, treading through a snowy meadow.",
    "一只猫在雪地里奔跑。",
]


@dataclass(frozen=True)
class FakeRelease:
    """The paths of the files, named as in the official README."""

    root: Path

    @property
    def small(self) -> Path:
        return self.root / "wan_models" / "Wan2.1-T2V-1.3B"

    @property
    def large(self) -> Path:
        return self.root / "wan_models" / "Wan2.1-T2V-14B"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"


def copy_fake_release(factory: pytest.TempPathFactory, root: Path) -> FakeRelease:
    """Write a release and its diffusers form into `root`. All tests of a run copy the same files."""

    def write(folder: Path) -> None:
        release = write_fake_release(folder)
        write_diffusers_release(release.root / "wan_models" / "Wan2.1-T2V-1.3B-Diffusers")

    shutil.copytree(made_once(factory, "fake release", write), root, dirs_exist_ok=True)
    return FakeRelease(root)


def write_fake_release(root: Path) -> FakeRelease:
    """Write every file that a user has after the download commands of the README."""
    from safetensors.torch import save_file

    release = FakeRelease(root)
    for folder, config, seed in ((release.small, SMALL, 1), (release.large, LARGE, 2)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(wan_config_json(config), indent=2))
        write_text_encoder(folder)
        torch.save(vae_state(), folder / "Wan2.1_VAE.pth")
        state = transformer_state(config, seed)
        if folder == release.small:
            save_file(state, folder / WAN_FILE)
        else:
            write_shards(folder, state, count=3)
    release.checkpoints.mkdir()
    torch.save(training_checkpoint(SMALL), release.checkpoints / "self_forcing_dmd.pt")
    torch.save({"generator": prefixed(transformer_state(SMALL, 6))}, release.checkpoints / "ode_init.pt")
    torch.save(taehv_state(), release.checkpoints / "taew2_1.pth")
    return release


def write_diffusers_release(folder: Path) -> None:
    """Write a diffusers pipeline: transformer, vae, text_encoder and tokenizer."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    write_transformer(folder, transformer_state(SMALL, 1), SMALL, format="diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoencoderKLWan(base_dim=VAE_BASE_DIM).save_pretrained(folder / "vae")
        vocab_size = write_tokenizer(folder / "tokenizer")
        UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **T5_SIZES)).save_pretrained(folder / "text_encoder")


def wan_config_json(config: WanConfig) -> dict:
    """Return config.json as Wan-AI publishes it."""
    names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": "t2v",
        **{name: getattr(config, name) for name in names},
    }


def transformer_state(config: WanConfig, seed: int) -> State:
    """Return random weights whose output depends on every input. (The head of a new model is zero.)"""
    generator = torch.Generator().manual_seed(seed)
    state = WanTransformer(config).state_dict()
    for name, tensor in state.items():
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        if ".norm" in name and name.endswith("weight"):
            tensor.add_(1)
    return dict(state)


def training_checkpoint(config: WanConfig) -> dict[str, State]:
    """Return a Self Forcing checkpoint. The average is close to the generator and far from the critic."""
    generator, critic = transformer_state(config, 3), transformer_state(config, 4)
    ema = {name: tensor + 0.01 * critic[name] for name, tensor in generator.items()}
    return {"generator": prefixed(generator), "critic": prefixed(critic), "generator_ema": prefixed(ema)}


def prefixed(state: State, prefix: str = "model.") -> State:
    """Return the state with the prefix that the official wrapper class adds."""
    return {prefix + name: tensor for name, tensor in state.items()}


def write_shards(folder: Path, state: State, count: int) -> None:
    """Write diffusion_pytorch_model-0000i-of-0000n.safetensors and their index, as for the 14B model."""
    from safetensors.torch import save_file

    names = list(state)
    weight_map = {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        shard = {name: state[name] for name in names[number::count]}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{WAN_FILE}.index.json").write_text(json.dumps(index, indent=2))


def write_text_encoder(folder: Path) -> None:
    """Write models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl."""
    vocab_size = write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(t5_state(vocab_size), folder / "models_t5_umt5-xxl-enc-bf16.pth")


def t5_state(vocab_size: int) -> State:
    """Return a bfloat16 UMT5 encoder under Wan's names."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **T5_SIZES)).state_dict()
    del state["encoder.embed_tokens.weight"]  # tied to shared.weight
    backwards = tuple((theirs, ours) for ours, theirs in WAN_T5_TO_TRANSFORMERS)
    return {name: tensor.bfloat16() for name, tensor in rename_keys(state, backwards).items()}


def write_tokenizer(folder: Path) -> int:
    """Train and write spiece.model, tokenizer.json and their configurations. Return the number of tokens."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=buffer,
        vocab_size=120,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(buffer.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 10**30, **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def vae_state() -> State:
    """Return the content of Wan2.1_VAE.pth at a small width."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        state = AutoencoderKLWan(base_dim=VAE_BASE_DIM).state_dict()
    return {original_vae_name(name): tensor for name, tensor in state.items()}


def original_vae_name(name: str) -> str:
    """Return a parameter's name in Wan2.1_VAE.pth from its name in diffusers."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    name = re.sub(r"(?<=\.)(norm1|conv1|norm2|conv2)(?=\.)", lambda part: parts[part[0]], name)
    name = name.replace("conv_shortcut", "shortcut").replace("conv_in.", "conv1.")
    name = name.replace("norm_out", "head.0").replace("conv_out", "head.2")
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    return re.sub(r"^post_quant_conv", "conv2", re.sub(r"^quant_conv", "conv1", name))


def taehv_state() -> State:
    """Return the content of taew2_1.pth at small widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return dict(TinyVAE(TAEHV).state_dict())
