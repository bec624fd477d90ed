"""Low-rank training starts equal to the frozen network, changes nothing else, and merges into the usual weights."""

import pytest
import torch

import train
from model.weights import load_state_dict
from model.weights.lora import merge_lora
from model.weights.lora_read import load_lora
from tests.shapes_parts import SIZES, tiny_transformer
from trainer.lora import LoRAConfig, add_lora, merge, take_lora

pytest_plugins = ["tests.shapes_parts"]


def with_lora(**options):
    transformer = tiny_transformer(0)
    add_lora(transformer, LoRAConfig(**{"rank": 2, **options}), torch.Generator().manual_seed(1))
    return transformer


def run(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 2, SIZES.in_dim, 4, 4, generator=generator)
    embeds = torch.randn(1, SIZES.text_len, SIZES.text_dim, generator=generator)
    return transformer(latents, torch.full((1, 2), 500.0), embeds)


def test_it_starts_as_the_network_it_is_added_to():
    assert torch.equal(run(with_lora()), run(tiny_transformer(0)))


def test_only_the_differences_of_the_chosen_layers_learn():
    transformer = with_lora(layers=["ffn"])
    learning = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert learning == {f"blocks.{b}.ffn.{i}.lora_{part}" for b in (0, 1) for i in (0, 2) for part in ("down", "up")}
    run(transformer).sum().backward()
    ups = [p.grad.abs().sum() for name, p in transformer.named_parameters() if name.endswith("up") and p.requires_grad]
    assert min(ups) > 0


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_merged_weights_give_the_same_output(alpha):
    transformer = with_lora(alpha=alpha)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("lora_up"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    state = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}
    lora = merge(state)
    assert len(lora.layers) == 2 * (4 + 4 + 2)
    plain = tiny_transformer(5)
    plain.load_state_dict(state)
    assert torch.allclose(run(plain), run(transformer), atol=1e-4)
    assert not torch.allclose(run(plain), run(tiny_transformer(0)), atol=1e-2)


def test_without_differences_a_state_dict_stays_as_it_is():
    state = tiny_transformer(0).state_dict()
    assert take_lora(state).layers == {} and state.keys() == tiny_transformer(0).state_dict().keys()


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="rank=-1"):
        LoRAConfig(rank=-1)
    with pytest.raises(ValueError, match="alpha=0"):
        LoRAConfig(alpha=0)
    with pytest.raises(ValueError, match=r"layers=\['nothing'\]"):
        with_lora(layers=["nothing"])


def test_a_run_leaves_merged_weights_and_a_peft_folder_and_can_be_resumed(release, tmp_path):
    flags = ["--config_path", release.config_path, "--no_visualize", "--logdir", str(tmp_path)]
    options = ["lora.rank=2", "critic_lora.rank=1", "optimizer.lr=0.01", "trainer.steps=2"]
    assert train.main([*flags, *options]) == 0
    base = load_state_dict(release.folder / "student")
    merged = load_state_dict(tmp_path / "model" / "generator")
    moved = {key for key in base if not torch.allclose(base[key], merged[key])}
    assert moved and all(".attn." in key or ".ffn." in key or "_attn." in key for key in moved)
    merge_lora(base, load_lora(tmp_path / "model" / "generator_lora"))
    assert all(torch.allclose(base[key], merged[key], atol=1e-6) for key in base)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["critic"].keys() == base.keys()
    assert train.main([*flags, *options, "trainer.steps=3"]) == 0
