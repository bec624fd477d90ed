"""Transformers of any size are read and written in files of any dialect. Forward passes equal those of diffusers."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from model.transformer import PRESETS, WanTransformer
from model.weights import load_state_dict, save_folder
from model.weights.transformer_config import read_declared_config, read_transformer_config
from model.weights.transformer_read import read_transformer
from model.weights.transformer_write import FORMATS, write_transformer
from tests.fake_release import (
    LARGE,
    SMALL,
    WAN_FILE,
    prefixed,
    training_checkpoint,
    transformer_state,
    wan_config_json,
    write_shards,
)
from utils.errors import UserError

DEFAULT = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def state():
    return transformer_state(LARGE, 1)


def read(path, **options):
    return read_transformer(path, **({"preset": DEFAULT} | options))


def assert_has(model, state):
    given = model.state_dict()
    assert given.keys() == state.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in state.items())


def releases(folder, state):
    """Yield (path, options) for each published layout."""
    for name in ("wan", "sharded"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(wan_config_json(LARGE)))
    save_file(state, folder / "wan" / WAN_FILE)
    write_shards(folder / "sharded", state, count=3)
    yield folder / "wan", {}
    yield folder / "wan" / WAN_FILE, {}
    yield folder / "sharded", {}
    (folder / "framewise").mkdir()
    contents = {
        "framewise/causal_forcing.pt": {"generator": prefixed(state, "model._fsdp_wrapped_module.")},
        "causvid.pt": {"model": prefixed(state)},
        "longvideo.pt": {"generator_ema": prefixed(state)},
        "longlive_base.pt": {"generator": prefixed(state)},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
        yield folder / name, {}
    save_file(prefixed(state), folder / "krea-realtime-video-14b.safetensors")
    yield folder / "krea-realtime-video-14b.safetensors", {}


def test_every_published_layout_loads_with_its_own_sizes_and_heads(tmp_path, state):
    for path, options in releases(tmp_path, state):
        model = read(path, **options)
        assert model.config == LARGE
        assert_has(model, state)
        assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 400_000])
def test_writing_and_reading_any_format_is_bitwise(tmp_path, state, format, dtype, shard_bytes):
    path = tmp_path / f"out{FORMATS[format].suffix}"
    write_transformer(path, dict(state), LARGE, format=format, dtype=dtype, shard_bytes=shard_bytes)
    model = read(path)
    assert model.config == LARGE
    assert_has(model, {name: tensor.to(dtype) for name, tensor in state.items()})
    for use_ema in (True, False):
        assert load_state_dict(path, use_ema=use_ema).keys() == state.keys()


@pytest.mark.parametrize("format", ["wan", "diffusers"])
def test_folders_keep_what_shapes_do_not_show(tmp_path, format):
    config = replace(SMALL, num_heads=4, eps=1e-5, prediction_type="x0")
    write_transformer(tmp_path / "out", transformer_state(config, 1), config, format=format)
    assert read(tmp_path / "out").config == config


def test_a_format_that_cannot_say_what_the_model_predicts_is_warned_about(tmp_path, caplog):
    config = replace(SMALL, prediction_type="x0")
    write_transformer(tmp_path / "out.safetensors", transformer_state(config, 1), config, format="comfyui")
    assert caplog.messages == ["the format comfyui cannot store that this model predicts x0"]


def test_published_config_json_is_what_the_wan_format_writes(tmp_path, state):
    write_transformer(tmp_path / "out", state, LARGE, format="wan")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    published = wan_config_json(LARGE)
    del published["_diffusers_version"]
    assert published.items() <= written.items()


def test_an_official_checkpoint_stores_both_names_once(tmp_path, state):
    write_transformer(tmp_path / "out.pt", state, LARGE, format="official")
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content.keys() == {"generator", "generator_ema"}
    assert all(key.startswith("model.") for key in content["generator"])
    assert (tmp_path / "out.pt").stat().st_size < 1.1 * sum(tensor.nbytes for tensor in state.values())


def test_a_path_that_does_not_suit_the_format_is_refused(tmp_path, state):
    for format, name in (("wan", "out.safetensors"), ("official", "out"), ("comfyui", "out.pt"), ("diffusers", "o.pt")):
        with pytest.raises(UserError, match=rf"{name}: the format {format} is a (file \*\.|folder)"):
            write_transformer(tmp_path / name, state, LARGE, format=format)
    assert not list(tmp_path.iterdir())


def test_without_config_json_a_preset_of_the_same_sizes_says_the_rest(tmp_path):
    shapes = WanTransformer(PRESETS["shapes"])
    torch.save({"generator": shapes.state_dict()}, tmp_path / "checkpoint.pt")
    assert read(tmp_path / "checkpoint.pt").config == PRESETS["shapes"]
    narrow = transformer_state(SMALL, 1)
    assert read_transformer_config(tmp_path / "w.pt", narrow, preset="shapes") == SMALL


def test_a_config_json_of_another_kind_beside_a_file_is_ignored(tmp_path, state):
    (tmp_path / "config.json").write_text('{"model_type": "umt5", "d_model": 3}')
    torch.save(state, tmp_path / "w.pt")
    assert read_declared_config(tmp_path / "w.pt") is None
    assert read(tmp_path / "w.pt").config == LARGE


def test_weights_that_contradict_their_config_are_refused_with_shapes_and_the_preset_that_fits(tmp_path):
    shapes = WanTransformer(PRESETS["shapes"])
    save_folder(tmp_path, shapes, asdict(PRESETS["shapes"]) | {"dim": 256, "num_heads": 2})
    with pytest.raises(UserError) as error:
        read(tmp_path)
    channels = PRESETS["shapes"].in_dim
    assert str(error.value).startswith(
        f"{tmp_path}: does not fit WanTransformer: patch_embedding.weight (file: (128, {channels}, 1, 2, 2), "
        f"model: (256, {channels}, 1, 2, 2)); patch_embedding.bias (file: (128,), model: (256,)); "
    )
    assert str(error.value).endswith("more; the weights are those of the preset shapes")
    save_folder(tmp_path, transformer_state(SMALL, 1), asdict(SMALL) | {"num_layers": 3})
    with pytest.raises(UserError, match=r"blocks\.2\..*missing.*the weights have dim=128, ffn_dim=192, num_layers=2"):
        read(tmp_path)


def broken_folders(folder, state):
    """Yield (path, text that its error must contain)."""

    def write(name, weights, config):
        save_folder(folder / name, weights, config)
        return folder / name

    sizes = asdict(LARGE)
    yield write("heads", state, sizes | {"num_heads": 3}), "num_heads=3"
    yield write("zero", state, sizes | {"num_heads": 0}), r"config.json: num_heads = 0: Input should be greater"
    yield write("text", state, sizes | {"dim": "256"}), r"config.json: dim = '256': Input should be a valid integer"
    yield write("patch", state, sizes | {"patch_size": 2}), "patch_size = 2: Input should be a valid list"
    yield write("eps", state, sizes | {"eps": "a"}), "eps = 'a': Input should be a valid number"
    yield (
        write("deep", state, sizes | {"num_layers": 10**7}),
        "num_layers = 10000000: Input should",
    )
    yield (
        write("wide", state, sizes | {"dim": 2**40, "num_heads": 2**33}),
        "json: dim = 1099511627776: Input should",
    )
    yield write("layers", state, sizes | {"num_layers": 4000}), "num_layers=4000, but the weights have dim=256"
    yield write("words", state, sizes | {"text_len": 2**40}), "text_len = 1099511627776: Input should be less"
    yield write("i2v", state, sizes | {"model_type": "i2v"}), "model_type='i2v'; only t2v"
    yield (
        write("diffusers", state, {"num_attention_heads": "2"}),
        "num_attention_heads = '2': Input should be a valid integer",
    )
    image = {**state, "img_emb.proj.0.weight": torch.zeros(3)}
    yield write("extra", image, sizes), r"img_emb.proj.0.weight \(file: \(3,\), model: not in it\)"
    yield write("vae", {"encoder.conv1.weight": torch.zeros(3)}, {}), "not a Wan transformer: it has no tensor"
    flat = {**state, "patch_embedding.weight": torch.zeros(3)}
    yield write("flat", flat, {}), r"not a Wan transformer: 'patch_embedding.weight' is \(3,\)"
    broken = {**state, "head.modulation": state["head.modulation"] * float("nan")}
    yield write("nan", broken, sizes), "'head.modulation' holds NaN"


def test_every_broken_folder_gives_one_line_that_names_it(tmp_path, state):
    for path, message in broken_folders(tmp_path, state):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["from diffusers", "to diffusers"])
def test_forward_equals_that_of_diffusers_after_either_conversion(tmp_path, direction):
    from diffusers import WanTransformer3DModel

    if direction == "from diffusers":
        torch.manual_seed(0)
        theirs = WanTransformer3DModel(
            num_attention_heads=LARGE.num_heads,
            attention_head_dim=LARGE.dim // LARGE.num_heads,
            ffn_dim=LARGE.ffn_dim,
            freq_dim=LARGE.freq_dim,
            text_dim=LARGE.text_dim,
            num_layers=LARGE.num_layers,
        )
        theirs.save_pretrained(tmp_path)
    else:
        write_transformer(tmp_path, transformer_state(LARGE, 1), LARGE, format="diffusers")
        theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", local_files_only=True)
    ours = read(tmp_path)
    assert ours.config == LARGE
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 3, 16, 4, 6, generator=generator)
    text = torch.randn(1, LARGE.text_len, LARGE.text_dim, generator=generator)
    expected = theirs(
        hidden_states=latents.transpose(1, 2), timestep=torch.tensor([625.0]), encoder_hidden_states=text
    ).sample.transpose(1, 2)
    flow = ours(latents, torch.full((1, 3), 625.0), text)
    assert expected.std() > 0.05
    assert (flow - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_training_checkpoint_gives_raw_or_averaged_weights(tmp_path):
    content = training_checkpoint(SMALL)
    torch.save(content, tmp_path / "self_forcing_dmd.pt")
    for use_ema, name in ((True, "generator_ema"), (False, "generator"), (None, "generator_ema")):
        expected = {key.removeprefix("model."): tensor for key, tensor in content[name].items()}
        assert_has(read(tmp_path / "self_forcing_dmd.pt", use_ema=use_ema), expected)
