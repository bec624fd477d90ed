"""LoRA: every style of names gives the same differences as its own library, and merging can be undone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.transformer import WanTransformer
from model.weights import diffusers_to_wan, wan_to_diffusers
from model.weights.lora import LoRA, LowRank, merge_lora, save_lora
from model.weights.lora_read import load_lora
from model.weights.transformer_read import read_transformer
from pipeline.config import DenoiserConfig
from pipeline.loading import load_transformer
from tests.fake_release import SMALL, transformer_state
from utils.errors import UserError

RANK, ALPHA = 3, 6.0
LAYERS = [
    f"blocks.{block}.{layer}"
    for block in range(SMALL.num_layers)
    for layer in (*(f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2")
]


@pytest.fixture(scope="module")
def weights():
    return transformer_state(SMALL, 1)


@pytest.fixture(scope="module")
def lora(weights):
    """Give differences with scale 2 = ALPHA / RANK for every layer that a LoRA usually has."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for name in LAYERS:
        outputs, inputs = weights[f"{name}.weight"].shape
        down = torch.randn(RANK, inputs, generator=generator) * 0.1
        layers[name] = LowRank(down, torch.randn(outputs, RANK, generator=generator) * 0.1, ALPHA / RANK)
    return LoRA(layers)


def keys(lora, down, up, rename=lambda name: name):
    """Return the tensors of a file without alphas. `down` and `up` are patterns with a place for the layer's name."""
    return {
        pattern.format(rename(name)): tensor
        for name, layer in lora.layers.items()
        for pattern, tensor in ((down, layer.down), (up, layer.up))
    }


def alphas(lora, pattern, rename=lambda name: name):
    return {pattern.format(rename(name)): torch.tensor(ALPHA) for name in lora.layers}


def diffusers_name(layer):
    return next(iter(wan_to_diffusers({f"{layer}.weight": torch.zeros(1)}))).removesuffix(".weight")


def underscores(layer):
    return layer.replace(".", "_")


def write_peft(folder, lora):
    folder.mkdir()
    pattern = "base_model.model.{}.lora_"
    save_file(keys(lora, pattern + "A.weight", pattern + "B.weight"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))


def write_diffusers(folder, lora):
    folder.mkdir()
    state = keys(lora, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", diffusers_name)
    settings = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(state, file, metadata={"format": "pt", "lora_adapter_metadata": settings})


def write_comfyui(path, lora):
    pattern = "diffusion_model.{}"
    state = keys(lora, f"{pattern}.lora_down.weight", f"{pattern}.lora_up.weight")
    save_file(state | alphas(lora, f"{pattern}.alpha"), path)


def kohya(lora):
    state = keys(lora, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", underscores)
    return state | alphas(lora, "lora_unet_{}.alpha", underscores)


def write_longlive(path, lora):
    """Write {"generator_lora", "critic_lora"} without alphas. Then alpha is the rank, so one matrix holds the scale."""
    pattern = "base_model.model.{}.lora_"
    state = keys(lora, pattern + "A.default.weight", pattern + "B.default.weight")
    state = {key: tensor * (ALPHA / RANK if "lora_B" in key else 1) for key, tensor in state.items()}
    torch.save({"generator_lora": state, "critic_lora": {key: -tensor for key, tensor in state.items()}}, path)


STYLES = {
    "peft": write_peft,
    "diffusers": write_diffusers,
    "comfyui.safetensors": write_comfyui,
    "kohya.safetensors": lambda path, lora: save_file(kohya(lora), path),
    "longlive.pt": write_longlive,
}


def assert_same_differences(left, right):
    left, right = dict(left.differences()), dict(right.differences())
    assert left.keys() == right.keys()
    for name, difference in left.items():
        torch.testing.assert_close(difference, right[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_gives_the_same_differences(tmp_path, lora, style):
    STYLES[style](tmp_path / style, lora)
    assert_same_differences(load_lora(tmp_path / style), lora)


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_diffusers_own_converters_give_the_same_differences(tmp_path, lora, style):
    from diffusers.loaders import lora_conversion_utils as convert

    if style == "kohya":
        theirs = convert._convert_musubi_wan_lora_to_diffusers(kohya(lora))
        save_file(kohya(lora), tmp_path / "lora.safetensors")
    else:
        write_comfyui(tmp_path / "lora.safetensors", lora)
        from safetensors.torch import load_file

        theirs = convert._convert_non_diffusers_wan_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    products = {
        key.removeprefix("transformer.").replace(".lora_A", ""): theirs[key.replace("lora_A", "lora_B")] @ down
        for key, down in theirs.items()
        if "lora_A" in key
    }
    expected = diffusers_to_wan(products)
    ours = dict(load_lora(tmp_path / "lora.safetensors").differences())
    assert ours.keys() == expected.keys()
    for name, difference in ours.items():
        torch.testing.assert_close(difference, expected[name], rtol=1e-5, atol=1e-6)


def test_merging_adds_the_scaled_product_and_unmerging_takes_it_back(weights, lora):
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    merge_lora(merged, lora, 0.5)
    layer = lora.layers[LAYERS[0]]
    name = f"{LAYERS[0]}.weight"
    torch.testing.assert_close(merged[name], weights[name] + 0.5 * ALPHA / RANK * layer.up @ layer.down)
    assert all(not torch.equal(merged[f"{name}.weight"], weights[f"{name}.weight"]) for name in LAYERS)
    assert torch.equal(merged["head.head.weight"], weights["head.head.weight"])
    merge_lora(merged, lora, -0.5)
    for name, tensor in weights.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_half_precision_weights_come_back_to_one_rounding(weights, lora):
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    merged = {name: tensor.clone() for name, tensor in half.items()}
    merge_lora(merged, lora)
    largest = max(difference.abs().max() for _, difference in lora.differences())
    merge_lora(merged, lora, -1.0)
    for name, tensor in half.items():
        assert (merged[name].float() - tensor.float()).abs().max() <= 2**-8 * (tensor.float().abs().max() + largest) * 2


def test_a_merged_lora_acts_as_an_adapter_beside_the_layer(weights, lora):
    model = WanTransformer(SMALL)
    model.load_state_dict(weights)
    x = torch.randn(4, SMALL.dim, generator=torch.Generator().manual_seed(0))
    layer, part = model.blocks[1].cross_attn.v, lora.layers["blocks.1.cross_attn.v"]
    with torch.no_grad():
        expected = layer(x) + part.scale * (x @ part.down.T) @ part.up.T
        merge_lora(dict(model.named_parameters()), lora)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("base", ["folder", "checkpoint"])
def test_the_pipeline_merges_a_lora_into_any_weights(tmp_path, weights, lora, base):
    path = tmp_path / ("base.pt" if base == "checkpoint" else "base")
    if base == "checkpoint":
        torch.save({"generator": {f"model.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        path.mkdir()
        save_file(weights, path / "diffusion_pytorch_model.safetensors")
    write_longlive(tmp_path / "lora.pt", lora)
    model = load_transformer(DenoiserConfig(weights=str(path), lora=str(tmp_path / "lora.pt"), lora_scale=0.25))
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    merge_lora(expected, lora, 0.25)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    before = read_transformer(path, preset="wan2.1-t2v-1.3b").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


def test_saved_and_reloaded_lora_is_bitwise_equal(tmp_path, lora):
    uneven = LoRA(dict(lora.layers))
    first, second = LAYERS[:2]
    uneven.layers[first] = LowRank(lora.layers[first].down[:2], lora.layers[first].up[:, :2], 0.25)
    uneven.layers[second] = LowRank(lora.layers[second].down.bfloat16(), lora.layers[second].up.bfloat16(), 2.0)
    save_lora(tmp_path / "out", uneven)
    reloaded = load_lora(tmp_path / "out")
    assert reloaded.layers.keys() == uneven.layers.keys()
    for name, layer in uneven.layers.items():
        again = reloaded.layers[name]
        assert torch.equal(again.down, layer.down)
        assert torch.equal(again.up, layer.up)
        assert again.scale == pytest.approx(layer.scale)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {first: 2}


def test_differences_of_biases_and_norms_are_merged_but_not_saved_for_peft(tmp_path, weights):
    state = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((SMALL.dim,), 0.5),
        "diffusion_model.blocks.1.norm3.diff": torch.full((SMALL.dim,), -1.0),
    }
    save_file(state, tmp_path / "lora.safetensors")
    lora = load_lora(tmp_path / "lora.safetensors")
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    merge_lora(merged, lora, 2.0)
    assert torch.equal(merged["blocks.0.self_attn.q.bias"], weights["blocks.0.self_attn.q.bias"] + 1)
    assert torch.equal(merged["blocks.1.norm3.weight"], weights["blocks.1.norm3.weight"] - 2)
    with pytest.raises(UserError, match=r"no place for the whole difference of 'blocks.0.self_attn.q.bias'; merge it"):
        save_lora(tmp_path / "out", lora)


def test_convolutions_are_merged_in_their_own_shape(weights):
    shape = weights["patch_embedding.weight"].shape
    down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1, 1)
    merged = {"patch_embedding.weight": torch.zeros(shape)}
    merge_lora(merged, LoRA({"patch_embedding": LowRank(down, up, 1.0)}))
    expected = torch.einsum("or,rcfhw->ocfhw", up[:, :, 0, 0, 0], down)
    torch.testing.assert_close(merged["patch_embedding.weight"], expected)


def broken_files(folder, lora):
    """Yield (path, text that its error must contain)."""
    yield folder / "absent.safetensors", "no such file"
    (folder / "hollow").mkdir()
    yield folder / "hollow", "holds neither adapter_model.safetensors nor"
    name, layer = next(iter(lora.layers.items()))
    down, up, unread = layer.down, layer.up, "belongs to no known kind of LoRA"
    matrices = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    cases = {
        "half": ({f"{name}.lora_A.weight": down}, "blocks.0.self_attn.q has no up .LoRA.; the file is incomplete"),
        "flux": (
            {"single_blocks.0.q.lora_A.weight": down, "single_blocks.0.q.lora_B.weight": up},
            "no place in a text",
        ),
        "dora": ({f"{name}.lora_magnitude_vector": down[0].clone()}, "has only the part 'row lengths'"),
        "lengths": (matrices | {f"{name}.dora_scale": torch.ones(7)}, r"lengths \(7,\) of DoRA do not fit a weight"),
        "number": (matrices | {f"{name}.dora_scale": torch.ones(())}, r"lengths \(\) of DoRA do not fit a weight"),
        "long": ({f"blocks.{'9' * 5000}.self_attn.q.lora_A.weight": down}, "the name of a tensor has"),
        "deep": (
            {"blocks.99999.ffn.0.lora_A.weight": down, "blocks.99999.ffn.0.lora_B.weight": up},
            "no place in a text",
        ),
        "lines": ({"blocks.0.x\ny.lora_A.weight": down}, "unprintable"),
        "oft": ({f"{name}.oft_blocks": down}, "adapter of the kind OFT"),
        "boft": ({f"{name}.boft_R": down}, "adapter of the kind BOFT"),
        "alphas": (matrices | {f"{name}.alpha": torch.ones(2)}, "2 values"),
        "integers": ({f"{name}.lora_A.weight": down.int(), f"{name}.lora_B.weight": up}, "stored as torch.int32"),
        "twice": (
            matrices | {f"transformer.{key}": tensor.clone() for key, tensor in matrices.items()},
            "is there twice",
        ),
        "lokr": ({f"{name}.lokr_w1": down}, r"has no lokr_w2 .LoKr.; the file is incomplete"),
        "loha": ({f"{name}.hada_w1_a": up, f"{name}.hada_w1_b": down}, r"has no hada_w2_a .LoHa."),
        "model": ({f"{name}.weight": down}, unread),
        "product": (
            {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:, :2].clone()},
            "the matrices cannot be multiplied",
        ),
    }
    for case, (state, message) in cases.items():
        save_file(state, folder / f"{case}.safetensors")
        yield folder / f"{case}.safetensors", message


def test_every_broken_lora_gives_one_line_that_names_it(tmp_path, lora):
    for path, message in broken_files(tmp_path, lora):
        with pytest.raises(UserError, match=message) as error:
            load_lora(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_lora_of_another_size_is_refused_and_changes_nothing(weights, lora):
    last = LAYERS[-1]
    wide = LowRank(lora.layers[last].down, torch.zeros(SMALL.dim * 2, RANK), 1.0)
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    with pytest.raises(UserError, match=rf"my.pt: does not fit the weights: {last}.weight \(LoRA: \(256, 192\)"):
        merge_lora(merged, LoRA({**lora.layers, last: wide}), source="my.pt")
    assert all(torch.equal(merged[name], tensor) for name, tensor in weights.items())


def test_a_lora_in_place_of_weights_is_recognised(tmp_path, lora):
    write_comfyui(tmp_path / "lora.safetensors", lora)
    with pytest.raises(UserError, match=r"is a LoRA, not a whole model; give it as generator.lora"):
        read_transformer(tmp_path / "lora.safetensors", preset="wan2.1-t2v-1.3b")
