"""All names that trainers use in LoRA files. Each dialect is one row, and all of them give the same differences."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from model.weights.lora import LoRA, LowRank, merge_loras
from model.weights.lora_choice import LoRAChoice, load_loras, parse_loras
from model.weights.lora_read import load_lora
from pipeline.config import DenoiserConfig
from pipeline.loading import load_transformer
from tests.fake_release import SMALL, transformer_state
from tests.model.test_lora import assert_same_differences, diffusers_name, underscores
from utils.config import load_config
from utils.errors import UserError

RANK, ALPHA = 3, 6
LAYERS = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "head.head", "time_projection.1"]


@pytest.fixture(scope="module")
def weights():
    return transformer_state(SMALL, 1)


@pytest.fixture(scope="module")
def lora(weights):
    """Give differences with scale 2 = ALPHA / RANK."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name in LAYERS:
        outputs, inputs = weights[f"{name}.weight"].shape
        down = torch.randn(RANK, inputs, generator=generator)
        layers[name] = LowRank(down, torch.randn(outputs, RANK, generator=generator), ALPHA / RANK)
    return LoRA(layers)


def same(name):
    return name


def mixed(name):
    """Return blocks_0.self_attn.q for blocks.0.self_attn.q."""
    return name.replace("blocks.", "blocks_")


# Program that writes the file, prefix of a layer, spelling of layers, names of the two matrices, name of the alpha.
DIALECTS = {
    "bare": ("", same, "lora_A.weight", "lora_B.weight", None),
    "peft": ("base_model.model.", same, "lora_A.weight", "lora_B.weight", None),
    "peft, not stripped": ("base_model.model.", same, "lora_A.default.weight", "lora_B.default.weight", None),
    "DiffSynth-Studio": ("pipe.dit.", same, "lora_A.default.weight", "lora_B.default.weight", None),
    "diffusion-pipe, ai-toolkit": ("diffusion_model.", same, "lora_A.weight", "lora_B.weight", None),
    "LightX2V": ("diffusion_model.", same, "lora_down.weight", "lora_up.weight", "alpha"),
    "whole ComfyUI names": ("model.diffusion_model.", same, "lora_down.weight", "lora_up.weight", "alpha"),
    "musubi, kohya": ("lora_unet_", underscores, "lora_down.weight", "lora_up.weight", "alpha"),
    "VideoX-Fun": ("lora_unet__", underscores, "lora_down.weight", "lora_up.weight", "alpha"),
    "mixed separators": ("lora_unet_", mixed, "lora_down.weight", "lora_up.weight", "alpha"),
    "LyCORIS": ("lycoris_", underscores, "lora_down.weight", "lora_up.weight", "alpha"),
    "LyCORIS, diffusers": (
        "lycoris_",
        lambda name: underscores(diffusers_name(name)),
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    ),
    "diffusers": ("transformer.", diffusers_name, "lora_A.weight", "lora_B.weight", None),
    "older diffusers": ("transformer.", diffusers_name, "lora.down.weight", "lora.up.weight", "alpha"),
    "oldest diffusers": ("", diffusers_name, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "alpha"),
    "named alphas": ("", same, "lora_down", "lora_up", "lora_alpha"),
    "no .weight": ("transformer.", same, "lora_A", "lora_B", "alpha"),
    "FSDP": ("module._fsdp_wrapped_module.", same, "lora_A.default.weight", "lora_B.default.weight", None),
}


def write(path, lora, dialect, alpha_dtype=torch.float32):
    prefix, spell, down, up, alpha = DIALECTS[dialect]
    state = {}
    for name, layer in lora.layers.items():
        key = prefix + spell(name)
        state[f"{key}.{down}"] = layer.down.clone()
        state[f"{key}.{up}"] = layer.up.clone() if alpha else layer.up * layer.scale
        if alpha:
            state[f"{key}.{alpha}"] = torch.tensor(ALPHA, dtype=alpha_dtype)
    save_file(state, path) if path.suffix != ".pt" else torch.save(state, path)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_differences(tmp_path, lora, dialect):
    write(tmp_path / "lora.safetensors", lora, dialect)
    assert_same_differences(load_lora(tmp_path / "lora.safetensors"), lora)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float64])
def test_an_alpha_may_have_any_type(tmp_path, lora, dtype):
    write(tmp_path / "lora.safetensors", lora, "musubi, kohya", dtype)
    assert_same_differences(load_lora(tmp_path / "lora.safetensors"), lora)


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "a.sft", "no_ending", "a.pt", "a.bin"])
def test_the_content_of_a_file_says_its_format(tmp_path, lora, name):
    write(tmp_path / "lora.pt" if name in ("a.pt", "a.bin") else tmp_path / "lora.safetensors", lora, "peft")
    next(tmp_path.iterdir()).rename(tmp_path / name)
    assert_same_differences(load_lora(tmp_path / name), lora)


PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "my style v2.safetensors"])
def test_peft_folders_use_their_settings_whatever_the_file_is_called(tmp_path, lora, name):
    state = {
        f"base_model.model.{layer}.lora_{x}.weight": tensor
        for layer, low in lora.layers.items()
        for x, tensor in (("A", low.down), ("B", low.up))
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | {"unknown": {"to": "us"}}))
    torch.save(state, tmp_path / name) if name.endswith(".bin") else save_file(state, tmp_path / name)
    (tmp_path / f"._{name}").write_bytes(b"what macOS leaves")
    (tmp_path / "README.md").write_text("notes")
    assert_same_differences(load_lora(tmp_path), lora)
    assert_same_differences(load_lora(tmp_path / name), lora)


def test_patterns_and_rslora_of_a_peft_config_count(tmp_path, lora):
    patterns = {"head.head": 12, r"blocks\.\d+\.ffn\.0": 1.5}
    config = PEFT | {"use_rslora": True, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write(
        tmp_path / "adapter_model.safetensors",
        LoRA({n: LowRank(p.down, p.up, 1.0) for n, p in lora.layers.items()}),
        "peft",
    )
    scales = {name: layer.scale for name, layer in load_lora(tmp_path).layers.items()}
    root = RANK**0.5
    assert scales["head.head"] == pytest.approx(12 / root)
    assert scales["blocks.1.ffn.0"] == pytest.approx(1.5 / root)
    assert scales["blocks.0.self_attn.q"] == pytest.approx(ALPHA / root)


def test_a_folder_with_several_files_or_adapters_asks_which(tmp_path, lora):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", lora, "bare")
    with pytest.raises(UserError, match=r"holds 2 files of weights \(a.safetensors, b.safetensors\); name the one"):
        load_lora(tmp_path)
    for name in ("style", "person"):
        (tmp_path / "named" / name).mkdir(parents=True)
        (tmp_path / "named" / name / "adapter_config.json").write_text(json.dumps(PEFT))
        write(tmp_path / "named" / name / "adapter_model.safetensors", lora, "bare")
    with pytest.raises(UserError, match=r"holds the adapters person, style; name one: .*named#person"):
        load_lora(tmp_path / "named")
    assert load_lora(tmp_path / "named", adapter="style").source.endswith("style/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds the adapters person, style; name one"):
        load_lora(tmp_path / "named", adapter="other")
    shutil.rmtree(tmp_path / "named" / "person")
    assert load_lora(tmp_path / "named").source.endswith("style/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds the adapters style; name one"):
        load_lora(tmp_path / "named", adapter="other")


def test_of_two_adapters_in_one_file_one_is_named(tmp_path, lora):
    state = {}
    for name, factor in (("style", 1.0), ("person", -1.0)):
        for layer, low in lora.layers.items():
            state[f"{layer}.lora_A.{name}.weight"] = low.down.clone()
            state[f"{layer}.lora_B.{name}.weight"] = factor * low.scale * low.up
    path = tmp_path / "two.safetensors"
    save_file(state, path)
    with pytest.raises(UserError, match=r"two.safetensors: holds the adapters person, style; name one: .*#person"):
        load_lora(path)
    assert_same_differences(load_lora(path, adapter="style"), lora)
    with pytest.raises(UserError, match="has no adapter 'other'; it holds person, style"):
        load_lora(path, adapter="other")
    ((chosen, scale),) = load_loras(f"{path}#person:-0.5")
    assert scale == -0.5
    assert_same_differences(chosen, LoRA({n: LowRank(p.down, -p.up, p.scale) for n, p in lora.layers.items()}))


def test_bias_norm_and_modulation_differences_are_merged(tmp_path, weights, lora):
    """LightX2V and AccVideo write these beside the matrices. peft scales its bias by alpha / rank."""
    layer = "blocks.0.self_attn.q"
    state = {
        f"diffusion_model.{layer}.lora_down.weight": lora.layers[layer].down,
        f"diffusion_model.{layer}.lora_up.weight": lora.layers[layer].up,
        f"diffusion_model.{layer}.diff_b": torch.full((SMALL.dim,), 0.5),
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, SMALL.dim), 2.0),
        "diffusion_model.head.diff_m": torch.full((2, SMALL.dim), 3.0),
        "diffusion_model.blocks.1.modulation.diff": torch.full((1, 6, SMALL.dim), 4.0),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.full((SMALL.dim,), 5.0),
        "diffusion_model.patch_embedding.diff": torch.full_like(weights["patch_embedding.weight"], 6.0),
        "lora_unet_blocks_1_norm3.w_norm": torch.full((SMALL.dim,), 7.0),
        "transformer.blocks.1.cross_attn.q.lora_A.weight": torch.zeros(RANK, SMALL.dim),
        "transformer.blocks.1.cross_attn.q.lora_B.weight": torch.zeros(SMALL.dim, RANK),
        "transformer.blocks.1.cross_attn.q.lora_B.bias": torch.full((SMALL.dim,), 8.0),
        "transformer.blocks.1.cross_attn.q.alpha": torch.tensor(ALPHA),
    }
    save_file(state, tmp_path / "lora.safetensors")
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    merge_loras(merged, [(load_lora(tmp_path / "lora.safetensors"), 1.0)])
    added = {
        f"{layer}.bias": 0.5,
        "blocks.0.modulation": 2.0,
        "head.modulation": 3.0,
        "blocks.1.modulation": 4.0,
        "blocks.1.self_attn.norm_q.weight": 5.0,
        "patch_embedding.weight": 6.0,
        "blocks.1.norm3.weight": 7.0,
        "blocks.1.cross_attn.q.bias": 8.0 * ALPHA / RANK,
    }
    for name, tensor in weights.items():
        if name != f"{layer}.weight":
            torch.testing.assert_close(merged[name], tensor + added.get(name, 0.0))
    assert not torch.equal(merged[f"{layer}.weight"], weights[f"{layer}.weight"])


def test_image_layers_are_left_out_with_one_warning_that_names_and_counts_them(tmp_path, weights, lora, caplog):
    write(tmp_path / "lora.safetensors", lora, "LightX2V")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "lora.safetensors")
    for layer in ("blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", "img_emb.proj.1"):
        state[f"diffusion_model.{layer}.lora_down.weight"] = torch.ones(RANK, 8)
        state[f"diffusion_model.{layer}.lora_up.weight"] = torch.ones(8, RANK)
    state["diffusion_model.patch_embedding.lora_down.weight"] = torch.ones(RANK, 36, 1, 2, 2)
    state["diffusion_model.patch_embedding.lora_up.weight"] = torch.ones(SMALL.dim, RANK, 1, 1, 1)
    state["text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"] = torch.ones(RANK, 8)
    save_file(state, tmp_path / "lora.safetensors")
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    with caplog.at_level(logging.WARNING):
        merge_loras(merged, [(load_lora(tmp_path / "lora.safetensors"), 1.0)])
    merge_loras(expected, [(lora, 1.0)])
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    (message,) = caplog.messages
    assert "ignored 5 layers for image-to-video and text encoder models" in message
    assert "diffusion_model.blocks.0.cross_attn.k_img" in message
    assert f"the other {len(LAYERS)} are merged" in message


def test_a_lora_of_image_layers_alone_is_refused(tmp_path, weights):
    save_file(
        {"img_emb.proj.1.lora_A.weight": torch.ones(2, 8), "img_emb.proj.1.lora_B.weight": torch.ones(8, 2)},
        tmp_path / "a.sft",
    )
    with pytest.raises(UserError, match="holds nothing for a text-to-video"):
        merge_loras(dict(weights), [(load_lora(tmp_path / "a.sft"), 1.0)])


def test_several_loras_are_added_each_with_its_scale_in_any_order(tmp_path, weights, lora):
    write(tmp_path / "a.safetensors", lora, "LightX2V")
    write(tmp_path / "b.safetensors", lora, "peft")
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    merge_loras(merged, load_loras(f"[{tmp_path}/a.safetensors:0.75, {tmp_path}/b.safetensors]", 2.0))
    name = f"{LAYERS[0]}.weight"
    expected = weights[name] + 3.5 * lora.layers[LAYERS[0]].difference()
    torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-4)
    other = {name: tensor.clone() for name, tensor in weights.items()}
    merge_loras(other, load_loras([f"{tmp_path}/b.safetensors:2", f"{tmp_path}/a.safetensors:1.5"]))
    torch.testing.assert_close(other[name], merged[name])


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (None, []),
        ("a.safetensors", [("a.safetensors", None, 1.0)]),
        ("a.safetensors:0.8", [("a.safetensors", None, 0.8)]),
        ("a.safetensors:-1e-1", [("a.safetensors", None, -0.1)]),
        ("C:/loras/a.pt:2", [("C:/loras/a.pt", None, 2.0)]),
        ("C:/loras/a.pt", [("C:/loras/a.pt", None, 1.0)]),
        ("folder#style", [("folder", "style", 1.0)]),
        ("folder#style:.5", [("folder", "style", 0.5)]),
        ("[a.safetensors:0.8, b.safetensors]", [("a.safetensors", None, 0.8), ("b.safetensors", None, 1.0)]),
        ("['a, b.pt:3', c]", [("a, b.pt", None, 3.0), ("c", None, 1.0)]),
        (["a:0.5", "b#x"], [("a", None, 0.5), ("b", "x", 1.0)]),
        ("[]", []),
    ],
)
def test_choices_are_read(text, choices):
    assert parse_loras(text) == [LoRAChoice(*choice) for choice in choices]


@pytest.mark.parametrize("text", ["[a.safetensors: 0.8]", "[a, 3]", "[a", "{a: b", "a.pt:1.2.3"])
def test_a_choice_that_cannot_be_read_is_one_line(text):
    if text == "{a: b":
        assert parse_loras(text) == [LoRAChoice(text)]
        return
    with pytest.raises(UserError, match=r"lora="):
        parse_loras(text)


def test_a_file_whose_name_looks_like_a_choice_is_that_file(tmp_path, lora):
    write(tmp_path / "x.safetensors", lora, "bare")
    odd = tmp_path / "style:0.5"
    (tmp_path / "x.safetensors").rename(odd)
    assert parse_loras(str(odd)) == [LoRAChoice(str(odd))]


BAD_CONFIGS = {
    "kind": ({"peft_type": "OFT"}, "adapter of the kind OFT"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "has changed the base weights"),
    "alpha": ({"lora_alpha": "many"}, "lora_alpha = 'many'"),
    "infinite": ({"lora_alpha": 1e400}, "Infinity|lora_alpha"),
    "rank": ({"r": 10**12}, "r = 1000000000000"),
    "slow": ({"alpha_pattern": {"(a+)+$": 1.0}}, "could take very long"),
    "broken": ({"alpha_pattern": {"blocks[": 1.0}}, "not a regular expression"),
    "list": ([1, 2], "adapter_config.json"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_adapter_config_is_one_line(tmp_path, lora, case):
    config, message = BAD_CONFIGS[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | config if isinstance(config, dict) else config))
    write(tmp_path / "adapter_model.safetensors", lora, "peft")
    with pytest.raises(UserError, match=message) as error:
        load_lora(tmp_path)
    assert "adapter_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_takes_one_lora_or_a_list_of_them(tmp_path):
    def load(yaml, *overrides):
        (tmp_path / "c.yaml").write_text(yaml)
        return load_config(DenoiserConfig, tmp_path / "c.yaml", overrides).lora

    assert load("weights: w.pt") is None
    assert load("lora: a.safetensors:0.8") == "a.safetensors:0.8"
    assert load("lora: [a.safetensors:0.8, b.pt]") == ["a.safetensors:0.8", "b.pt"]
    for text in ("lora=[a.safetensors:0.8, b.pt]", "lora=['a.safetensors:0.8',b.pt]"):
        assert [choice.scale for choice in parse_loras(load("weights: w.pt", text))] == [0.8, 1.0]
    assert load("lora: a", "lora=null") is None
    for wrong in ("lora: 3", "lora: {a: 0.8}", "lora: [a, 3]"):
        with pytest.raises(UserError, match=r"lora=.* is not a path or a list of paths"):
            load(wrong)


def test_a_bad_lora_ends_inference_with_one_line_before_the_weights_are_read(tmp_path):
    """The weights cannot be read either, but the LoRA is checked first."""
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    config = DenoiserConfig(weights=str(tmp_path / "weights.pt"), lora=str(tmp_path / "absent.safetensors"))
    with pytest.raises(UserError, match=r"absent.safetensors: no such file"):
        load_transformer(config)
