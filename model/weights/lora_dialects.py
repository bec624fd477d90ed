"""The names that LoRA files use. A new dialect is a new row in one of these tables, with a test.

A key consists of a layer's name and a part: ``diffusion_model.blocks.0.self_attn.q`` + ``.lora_down.weight``.

The separators of layer names do not matter: dots, underscores and repeated ones are the same. So
``lora_unet_blocks_0.self_attn.q``, ``lora_unet__blocks_0_self_attn_q`` and ``blocks.0.attn1.to_q`` name one layer.
"""

import re
from functools import cache
from typing import NamedTuple

from model.weights.names import WAN_TO_DIFFUSERS

# Prefixes that trainers, wrappers and libraries put before a layer's name, in any order and number.
PREFIXES = (
    "base_model",  # peft
    "model",
    "transformer",  # diffusers, finetrainers
    "diffusion_model",  # ComfyUI, diffusion-pipe, ai-toolkit, LightX2V
    "lora_unet",  # kohya, musubi-tuner; with two underscores VideoX-Fun
    "lora_transformer",
    "lora_dit",
    "lycoris",  # LyCORIS, SimpleTuner, ai-toolkit
    "pipe",  # DiffSynth-Studio: pipe.dit
    "dit",
    "unet",
    "generator",
    "denoiser",
    "module",
    "net",
    "orig_mod",
    "fsdp_wrapped_module",
)

# The end of a key -> the part of an adapter. The name of an adapter may follow (lora_A.default.weight).
PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "lora_magnitude_vector": "row lengths",
    "dora_scale": "lengths",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",
    "w_norm": "diff",  # LyCORIS norms
    "b_norm": "diff_b",
    "set_weight": "set_weight",
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}

# The end of a key -> a kind of adapter that this program cannot apply.
UNSUPPORTED = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "boft_s": "BOFT",
    "a1": "GLoRA",
    "b1": "GLoRA",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "hra_u": "HRA",
    "ln_tuning_layers": "LN tuning",
}

# Layers of other models, which a text-to-video model can ignore -> their purpose.
FOREIGN_LAYERS = {
    r"blocks_\d+_cross_attn_(k_img|v_img|norm_k_img)": "image-to-video",
    r"img_emb(_.+)?": "image-to-video",
    r"blocks_\d+_attn2_(add_k_proj|add_v_proj|norm_added_k)": "image-to-video",
    r"condition_embedder_image_embedder_.+": "image-to-video",
    r"vace_(blocks|patch_embedding).*": "VACE",
    r"(ref_conv|control_adapter)(_.+)?": "Fun-Control",
    r"(text_encoder|text_model|lora_te\d?|te\d?|clip)_.+": "text encoder",
}

_PREFIX = re.compile(rf"^((?:{'|'.join(PREFIXES)})_)+")
_ENDING = "|".join(map(re.escape, sorted([*PARTS, *UNSUPPORTED], key=len, reverse=True)))
_KEY = re.compile(
    rf"(?P<layer>.+?)\.(?P<part>{_ENDING})(\.(?P<adapter>(?!weight$|bias$)[\w-]+))?(\.(?P<end>weight|bias))?"
)


class Key(NamedTuple):
    """The components of a tensor's name."""

    layer: str
    """The layer as the file spells it, with its prefix."""
    part: str
    """A value of PARTS, or the key of UNSUPPORTED."""
    adapter: str | None
    """The name of the adapter, such as default, if the key holds it."""
    is_bias: bool
    """Whether the key ends in .bias."""


def split_key(key: str) -> Key | None:
    """Split a tensor's name into its components. Return None if it is no name of an adapter's tensor."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = PARTS.get(match["part"], match["part"])
    return Key(match["layer"], part, match["adapter"], match["end"] == "bias")


def our_layer(name: str) -> str | None:
    """Return our name of a layer, from any spelling. None if a text-to-video Wan transformer has no such layer."""
    plain = _plain(name)
    for pattern, ours in _layer_patterns():
        if match := pattern.fullmatch(plain):
            return ours.format(*match.groups())
    return None


def foreign_layer(name: str) -> str | None:
    """Return the purpose of another model's layer, such as image-to-video. None if it is not known."""
    flat = re.sub(r"[._]+", "_", name)
    spellings = (_plain(name), flat)
    known = (purpose for pattern, purpose in FOREIGN_LAYERS.items() for s in spellings if re.fullmatch(pattern, s))
    return next(known, None)


def _plain(name: str) -> str:
    """Return a layer's name with single underscores and without prefixes."""
    return _PREFIX.sub("", re.sub(r"[._]+", "_", name).lstrip("_"), count=1)


@cache
def _layer_patterns() -> tuple[tuple[re.Pattern, str], ...]:
    layers = {ours.removesuffix(".*"): theirs.removesuffix(".*") for ours, theirs in WAN_TO_DIFFUSERS}
    owners = {ours.removesuffix(".modulation"): ours.removesuffix(".modulation") for ours in layers}
    pairs = [*layers.items(), *owners.items(), *((ours, ours) for ours in layers)]
    return tuple(
        (re.compile(re.escape(theirs.replace(".", "_")).replace(r"\*", r"(\d{1,4})")), ours.replace("*", "{}"))
        for ours, theirs in pairs
    )
