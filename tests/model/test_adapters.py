"""LoRA, DoRA, LoHa and LoKr change a weight exactly as peft does and as their formulas say."""

import itertools
import json

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from model.weights.adapters import Decomposed, Hadamard, Kronecker, LowRank
from model.weights.lora import LoRA, merge_loras
from model.weights.lora_read import load_lora
from tests.fake_release import SMALL, transformer_state

LAYERS = ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2"]


class Base(nn.Module):
    """Linear layers with the names of a Wan transformer."""

    def __init__(self, weights):
        super().__init__()
        for name in LAYERS:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            outputs, inputs = weights[f"{name}.weight"].shape
            layer = nn.Linear(inputs, outputs)
            layer.weight.data.copy_(weights[f"{name}.weight"])
            layer.bias.data.copy_(weights[f"{name}.bias"])
            parent.add_module(last, layer)

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def weights():
    return transformer_state(SMALL, 1)


def peft_config(kind):
    targets = {"target_modules": LAYERS, "r": 4}
    return {
        "lora": lambda: LoraConfig(lora_alpha=6, alpha_pattern={"ffn.0": 3}, rank_pattern={"ffn.2": 2}, **targets),
        "lora with bias": lambda: LoraConfig(lora_alpha=6, lora_bias=True, **targets),
        "rslora": lambda: LoraConfig(lora_alpha=6, use_rslora=True, **targets),
        "dora": lambda: LoraConfig(lora_alpha=6, use_dora=True, **targets),
        "trained biases": lambda: LoraConfig(lora_alpha=6, bias="lora_only", **targets),
        "whole layer": lambda: LoraConfig(
            lora_alpha=6, modules_to_save=["blocks.1.ffn.2"], r=4, target_modules=LAYERS[:2]
        ),
        "loha": lambda: LoHaConfig(alpha=6, **targets),
        "lokr": lambda: LoKrConfig(alpha=6, **targets),
        "lokr, both decomposed": lambda: LoKrConfig(
            alpha=6, decompose_both=True, decompose_factor=8, **{**targets, "r": 2}
        ),
        "lokr, whole factors": lambda: LoKrConfig(alpha=6, **(targets | {"r": 64})),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "lora with bias",
        "rslora",
        "dora",
        "trained biases",
        "whole layer",
        "loha",
        "lokr",
        "lokr, both decomposed",
        "lokr, whole factors",
    ],
)
def test_merging_a_peft_adapter_equals_the_merge_of_peft(tmp_path, weights, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(Base(weights), peft_config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
                assert "weight" not in name or "lora" in name or "modules_to_save" in name or "bias" in name
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    merged = {name: tensor.clone() for name, tensor in weights.items()}
    merge_loras(merged, [(load_lora(tmp_path), 1.0)])
    for name in LAYERS:
        for part in ("weight", "bias"):
            torch.testing.assert_close(merged[f"{name}.{part}"], expected[f"{name}.{part}"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged[f"{name}.weight"], weights[f"{name}.weight"], atol=1e-3)


SEEDS = itertools.count()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(next(SEEDS)))


def test_loha_and_lokr_equal_their_sums_written_out():
    """Values are compared one by one, for a linear layer and for a convolution with and without Tucker kernels."""
    r, o, i, k = 2, 6, 4, (1, 2, 2)
    a1, b1, a2, b2 = random(o, r), random(r, i), random(o, r), random(r, i)
    expected = 0.5 * torch.einsum("or,ri->oi", a1, b1) * torch.einsum("or,ri->oi", a2, b2)
    torch.testing.assert_close(Hadamard((a1, b1), (a2, b2), 0.5).difference(), expected)
    t1, t2 = random(r, r, *k), random(r, r, *k)
    tucker = Hadamard((a1.T, b1), (a2.T, b2), 0.5, (t1, t2))
    first, second = (torch.einsum("rsfhw,ro,si->oifhw", t, a.T, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    torch.testing.assert_close(tucker.difference(), 0.5 * first * second)
    assert tucker.shape == (o, i, *k)
    w1, w2 = random(2, 3), random(4, 5, *k)
    kronecker = Kronecker(w1, w2, 0.5)
    expected = torch.einsum("ab,cdfhw->acbdfhw", w1, w2).reshape(8, 15, *k) * 0.5
    torch.testing.assert_close(kronecker.difference(), expected)
    factors = (random(4, r), random(r, 5, *k))
    whole = (factors[0] @ factors[1].flatten(1)).view(4, 5, *k)
    torch.testing.assert_close(Kronecker(w1, factors, 1.0).difference(), Kronecker(w1, whole, 1.0).difference())
    down, up, mid = random(r, i, 1, 1, 1), random(o, r, 1, 1, 1), random(r, r, *k)
    expected = torch.einsum("or,rsfhw,si->oifhw", up[..., 0, 0, 0], mid, down[..., 0, 0, 0]) * 0.5
    torch.testing.assert_close(LowRank(down, up, 0.5, mid).difference(), expected)


@pytest.mark.parametrize("of", ["rows", "columns"])
def test_dora_sets_the_lengths_of_rows_or_columns(of):
    weight, axis = random(5, 3), 1 if of == "rows" else 0
    magnitude = random(5, 1).abs() if of == "rows" else random(1, 3).abs()
    adapter = Decomposed(LowRank(random(2, 3), random(5, 2), 0.7), magnitude)
    changed = weight + adapter.difference(weight)
    torch.testing.assert_close(changed.norm(dim=axis), magnitude.flatten())
    inner = weight + adapter.inner.difference()
    assert torch.nn.functional.cosine_similarity(changed, inner, dim=axis).min() > 0.9999


def lycoris_file(tmp_path, parts):
    save_file({f"lycoris_blocks_0_self_attn_q.{part}": t.contiguous() for part, t in parts.items()}, tmp_path / "l.sft")
    return load_lora(tmp_path / "l.sft").layers["blocks.0.self_attn.q"]


def test_the_scale_of_a_lycoris_file_is_alpha_over_the_rank_of_its_factors(tmp_path):
    d = SMALL.dim
    alpha = {"alpha": torch.tensor(8)}
    loha = {f"hada_{w}_{x}": random(*(d, 4) if x == "a" else (4, d)) for w in ("w1", "w2") for x in "ab"}
    assert lycoris_file(tmp_path, loha | alpha).scale == 2
    low = {"lokr_w1": random(8, 8), "lokr_w2_a": random(d // 8, 4), "lokr_w2_b": random(4, d // 8)}
    assert lycoris_file(tmp_path, low | alpha).scale == 2
    whole = {"lokr_w1": random(8, 8), "lokr_w2": random(d // 8, d // 8), "alpha": torch.tensor(9999999827968.0)}
    assert lycoris_file(tmp_path, whole).scale == 1
    dora = {"lora_down.weight": random(4, d), "lora_up.weight": random(d, 4), "dora_scale": random(1, d).abs()}
    adapter = lycoris_file(tmp_path, dora | alpha)
    assert adapter.inner.scale == 2
    assert adapter.kind == "DoRA"


def test_a_scale_moves_between_the_weight_and_the_changed_weight(weights):
    """This also holds for DoRA, whose difference depends on the weight. The order of two of them does not matter."""
    name = "blocks.0.self_attn.q"
    d = SMALL.dim
    dora = LoRA({name: Decomposed(LowRank(random(2, d), random(d, 2), 0.1), random(d).abs())})
    plain = LoRA({name: LowRank(random(2, d), random(d, 2), 0.1)})
    results = []
    for loras in ([(dora, 0.5), (plain, 2.0)], [(plain, 2.0), (dora, 0.5)]):
        merged = {key: tensor.clone() for key, tensor in weights.items()}
        merge_loras(merged, loras)
        results.append(merged[f"{name}.weight"])
    torch.testing.assert_close(results[0], results[1])
    weight = weights[f"{name}.weight"]
    expected = weight + 0.5 * dora.layers[name].difference(weight) + 2 * plain.layers[name].difference()
    torch.testing.assert_close(results[0], expected)


def test_a_peft_folder_without_its_settings_counts_its_rank_as_alpha(tmp_path, weights):
    model = peft.get_peft_model(Base(weights), peft.LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file(state, tmp_path / "alone.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert {layer.scale for layer in load_lora(tmp_path / "alone.safetensors").layers.values()} == {1.0}
