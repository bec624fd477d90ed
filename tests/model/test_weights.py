"""Weight files: every format gives the same tensors, every bad file one clear line."""

import json
import os
import pickle
import re

import pytest
import torch
from torch import nn

from model.transformer_files import infer_transformer_sizes
from model.weights import (
    WAN_T5_TO_TRANSFORMERS,
    diffusers_to_wan,
    load_into,
    load_state_dict,
    read_config,
    rename_keys,
    save_folder,
    wan_to_diffusers,
    weights_hash,
)
from utils.errors import UserError


class Code:
    """Pickles as a call of os.system."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


class Tiny(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.register_buffer("count", torch.arange(2))


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {"blocks.0.self_attn.q.weight": torch.randn(6, 4), "head.modulation": torch.randn(1, 2, 4).bfloat16()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype
        assert torch.equal(tensor, right[key]), key


def wrapped(state, prefix, infix=""):
    return {prefix + key.replace("blocks.0.", f"blocks.0.{infix}"): tensor for key, tensor in state.items()}


def write_shards(folder, state, weight_map=None):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    names = {key: f"part-{number}.safetensors" for number, key in enumerate(state)}
    for key, name in names.items():
        save_file({key: state[key]}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map or names}))
    return folder


FORMATS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": wrapped(state, "module.")},
    "training": lambda state: {
        "generator": {key: tensor + 1 for key, tensor in state.items()},
        "critic": {key: tensor + 2 for key, tensor in state.items()},
        "generator_ema": wrapped(state, "model._fsdp_wrapped_module.", "_checkpoint_wrapped_module._orig_mod."),
    },
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_of_a_pytorch_file_gives_the_same_tensors(tmp_path, state, layout, zipped):
    torch.save(FORMATS[layout](state), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(tmp_path / "w.pt"), state)


def test_folder_shards_and_single_file_give_the_same_tensors(tmp_path, state):
    save_folder(tmp_path / "single", state, {"dim": 4})
    assert_same(load_state_dict(tmp_path / "single"), state)
    assert_same(load_state_dict(tmp_path / "single" / "model.safetensors"), state)
    assert read_config(tmp_path / "single") == {"dim": 4}
    assert_same(load_state_dict(write_shards(tmp_path / "sharded", state)), state)


def test_shards_that_are_links_out_of_the_folder_load(tmp_path, state):
    """A hub snapshot is a folder of links into ../../blobs."""
    write_shards(tmp_path / "blobs", state)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert_same(load_state_dict(tmp_path / "snapshot"), state)


def test_use_ema_chooses_the_generator(tmp_path, state):
    torch.save(FORMATS["training"](state), tmp_path / "both.pt")
    raw = load_state_dict(tmp_path / "both.pt", use_ema=False)
    assert torch.equal(raw["head.modulation"], state["head.modulation"] + 1)

    torch.save({"generator": state}, tmp_path / "ode_init.pt")
    assert_same(load_state_dict(tmp_path / "ode_init.pt", use_ema=False), state)
    with pytest.raises(UserError, match=r"ode_init.pt: has no generator_ema .*drop --use_ema"):
        load_state_dict(tmp_path / "ode_init.pt")


def test_pickled_code_is_refused_and_not_run(tmp_path, state):
    target = tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Code(target)}, tmp_path / "zip.pt")
    torch.save({"extra": Code(target)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Code(target), protocol=2))
    for name in ("zip.pt", "old.pt", "raw.pt"):
        with pytest.raises(UserError, match=f"{name}: contains pickled code"):
            load_state_dict(tmp_path / name)
    assert not target.exists()


def hostile_files(folder, state):
    """(path, what its one line must say) of every damaged or wrong file."""
    yield folder / "absent.pt", "no such file"
    (folder / "empty.pt").touch()
    yield folder / "empty.pt", "is empty"
    (folder / "page.pt").write_text("<html>404</html>")
    yield folder / "page.pt", "not a PyTorch file"
    (folder / "page.safetensors").write_text("<html>404</html>")
    yield folder / "page.safetensors", "not a safetensors file"
    (folder / "plain.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    yield folder / "plain.pt", "download it again"
    for zipped in (True, False):
        whole = folder / f"whole{zipped}.pt"
        torch.save({**state, "big": torch.zeros(20_000)}, whole, _use_new_zipfile_serialization=zipped)
        for share in (0.001, 0.5, 0.99):
            cut = folder / f"cut{zipped}{share}.pt"
            cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
            yield cut, "damaged|download it again"
    save_folder(folder / "whole", state, {})
    (folder / "cut.safetensors").write_bytes((folder / "whole/model.safetensors").read_bytes()[:-5])
    yield folder / "cut.safetensors", "truncated"
    torch.save(torch.zeros(3), folder / "tensor.pt")
    yield folder / "tensor.pt", "holds a Tensor where a state dict was expected"
    torch.save({"step": 3}, folder / "number.pt")
    yield folder / "number.pt", "'step' is a int, not a tensor"
    torch.save({}, folder / "nothing.pt")
    yield folder / "nothing.pt", "holds no tensors"
    torch.save({"model.a": torch.zeros(1), "a": torch.zeros(1)}, folder / "twice.pt")
    yield folder / "twice.pt", "two tensors are called 'a'"
    (folder / "hollow").mkdir()
    yield folder / "hollow", "holds neither model.safetensors nor"
    key = next(iter(state))
    yield (write_shards(folder / "gone", state, {key: "part-9.safetensors"}), "'part-9.safetensors', which is missing")
    for number, name in enumerate(["../gone/part-0.safetensors", "/etc/hostname", "a\\..\\b"]):
        yield (write_shards(folder / f"out{number}", state, {key: name}), "outside its own folder")
    yield (
        write_shards(folder / "short", state, {**dict.fromkeys(state, "part-0.safetensors")}),
        "which no shard holds",
    )
    (write_shards(folder / "bad", state) / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    yield folder / "bad", "not readable as JSON"


def test_every_hostile_file_gives_one_line_that_names_it(tmp_path, state):
    for path, message in hostile_files(tmp_path, state):
        with pytest.raises(UserError, match=message) as error:
            load_state_dict(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


def test_load_into_a_meta_module_is_strict_and_keeps_requires_grad(tmp_path):
    source = Tiny()
    save_folder(tmp_path, source, {})
    with torch.device("meta"):
        target = Tiny()
    target.inner.bias.requires_grad_(False)
    load_into(target, load_state_dict(tmp_path), source="tiny", dtype=torch.bfloat16)
    assert torch.equal(target.inner.weight, source.inner.weight.bfloat16())
    assert target.count.dtype == torch.int64
    assert target.inner.weight.requires_grad
    assert not target.inner.bias.requires_grad


def test_training_loaded_weights_leaves_their_file_alone(tmp_path):
    save_folder(tmp_path, Tiny(), {})
    before = (tmp_path / "model.safetensors").read_bytes()
    module = Tiny()
    load_into(module, load_state_dict(tmp_path), source="tiny")
    with torch.no_grad():
        module.inner.weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_folder(tmp_path, module, {})
    assert torch.equal(load_state_dict(tmp_path)["inner.weight"], module.inner.weight)


def test_a_mismatch_names_the_first_three_tensors_with_both_shapes():
    state = Tiny(width=5).state_dict()
    state["stray"] = state.pop("count")
    with pytest.raises(UserError) as error:
        load_into(Tiny(), state, source="w.pt")
    assert str(error.value) == (
        "w.pt: does not fit Tiny: count (file: missing, model: (2,)); inner.weight (file: (5, 4), model: (3, 4)); "
        "inner.bias (file: (5,), model: (3,)) and 1 more"
    )


def test_an_interrupted_save_keeps_the_old_files(tmp_path, state):
    save_folder(tmp_path, state, {"version": 1})
    with pytest.raises(TypeError):
        save_folder(tmp_path, {"a": torch.zeros(1)}, {"version": object()})
    assert read_config(tmp_path) == {"version": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_save_folder_converts_floats_only(tmp_path):
    save_folder(tmp_path, Tiny(), {}, dtype=torch.bfloat16)
    assert {t.dtype for t in load_state_dict(tmp_path).values()} == {torch.bfloat16, torch.int64}


def test_weights_hash_depends_on_contents_alone(tmp_path, state):
    state["big"] = torch.randn(400, 400)
    save_folder(tmp_path / "folder", state, {})
    torch.save({"model": wrapped(dict(reversed(state.items())), "module.")}, tmp_path / "w.pt")
    digest = weights_hash(state)
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert weights_hash(tmp_path / "folder") == weights_hash(tmp_path / "w.pt") == digest
    assert weights_hash({**state, "big": state["big"] * 1.001}) != digest
    assert weights_hash({**state, "head.modulation": state["head.modulation"].float()}) != digest
    nudged = state["head.modulation"].clone()
    nudged[0, 1, 3] += 1
    assert weights_hash({**state, "head.modulation": nudged}) != digest


@pytest.fixture(scope="module")
def wan_diffusers():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=6,
        text_dim=10,
        freq_dim=8,
        ffn_dim=40,
        num_layers=3,
    )


def test_diffusers_names_map_both_ways_as_diffusers_own_converter_does(wan_diffusers):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    theirs = wan_diffusers.state_dict()
    ours = diffusers_to_wan(theirs)
    assert len(ours) == len(theirs)
    assert_same(wan_to_diffusers(ours), theirs)
    assert_same(convert_wan_transformer_to_diffusers(dict(ours)), theirs)
    with pytest.raises(UserError, match=r"'img_emb.proj.0.weight'"):
        wan_to_diffusers({"img_emb.proj.0.weight": torch.zeros(1)})


def test_a_diffusers_folder_loads_under_wan_names_with_its_sizes(tmp_path, wan_diffusers):
    wan_diffusers.save_pretrained(tmp_path)
    state = load_state_dict(tmp_path)
    assert_same(state, diffusers_to_wan(wan_diffusers.state_dict()))
    assert infer_transformer_sizes(state) == {
        "dim": 24,
        "num_layers": 3,
        "ffn_dim": 40,
        "freq_dim": 8,
        "text_dim": 10,
        "in_dim": 4,
        "out_dim": 6,
        "patch_size": [1, 2, 2],
    }
    with pytest.raises(UserError, match=r"no tensor 'patch_embedding.weight'"):
        infer_transformer_sizes({"a": torch.zeros(1)})


def test_t5_names_map_one_to_one():
    backwards = tuple((theirs, ours) for ours, theirs in WAN_T5_TO_TRANSFORMERS)
    parts = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    names = [f"blocks.{i}.{part}.weight" for i in (0, 23) for part in (*parts, "pos_embedding.embedding")]
    state = dict.fromkeys([*names, "token_embedding.weight", "norm.weight"], torch.zeros(1))
    renamed = rename_keys(state, WAN_T5_TO_TRANSFORMERS)
    assert len(renamed) == len(state)
    assert rename_keys(renamed, backwards).keys() == state.keys()
