"""Weight files: every format gives the same tensors, and every bad file gives one clear line."""

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.weights import (
    WAN_T5_TO_TRANSFORMERS,
    diffusers_to_wan,
    load_into,
    load_state_dict,
    read_config,
    rename_keys,
    save_folder,
    save_safetensors,
    torch_file,
    wan_to_diffusers,
    weights_hash,
)
from model.weights.transformer_config import infer_transformer_sizes
from utils.errors import UserError


class Code:
    """An object whose pickle calls os.system."""

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
    """A snapshot of the hub is a folder of links into ../../blobs."""
    write_shards(tmp_path / "blobs", state)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert_same(load_state_dict(tmp_path / "snapshot"), state)


def test_use_ema_chooses_the_generator(tmp_path, state):
    torch.save(FORMATS["training"](state), tmp_path / "both.pt")
    raw = load_state_dict(tmp_path / "both.pt", use_ema=False)
    assert torch.equal(raw["head.modulation"], state["head.modulation"] + 1)

    assert_same(load_state_dict(tmp_path / "both.pt", use_ema=True), state)
    assert_same(load_state_dict(tmp_path / "both.pt"), state)

    torch.save({"generator": state}, tmp_path / "ode_init.pt")
    assert_same(load_state_dict(tmp_path / "ode_init.pt", use_ema=False), state)
    assert_same(load_state_dict(tmp_path / "ode_init.pt"), state)
    with pytest.raises(UserError, match=r"ode_init.pt: has no generator_ema .*drop --use_ema"):
        load_state_dict(tmp_path / "ode_init.pt", use_ema=True)
    torch.save({"generator_ema": state}, tmp_path / "dmd.pt")
    with pytest.raises(UserError, match=r"dmd.pt: has no generator .*pass --use_ema"):
        load_state_dict(tmp_path / "dmd.pt", use_ema=False)


def swapped_checkpoints(state):
    """Yield checkpoints in which generator and critic are swapped."""
    other = {key: tensor + 2 for key, tensor in state.items()}
    average = {key: tensor + 0.01 for key, tensor in state.items()}
    yield {"generator": other, "critic": state, "generator_ema": average}
    yield {"generator": wrapped(other, "model."), "critic": state, "generator_ema": wrapped(average, "model.")}
    yield {"generator": {**state, "model._register_tokens": torch.zeros(2)}, "critic": other}
    yield {"generator": {**state, "_cls_pred_branch.0.weight": torch.zeros(2)}, "critic": other}


def test_swapped_generator_and_critic_are_noticed_and_the_right_way_round_is_not(tmp_path, state):
    for checkpoint in swapped_checkpoints(state):
        torch.save(checkpoint, tmp_path / "swapped.pt")
        with pytest.raises(UserError, match=r"swapped.pt: its generator.* swapped"):
            load_state_dict(tmp_path / "swapped.pt")
    right = next(swapped_checkpoints(state))
    right["generator"], right["critic"] = right["critic"], right["generator"]
    torch.save(right, tmp_path / "right.pt")
    assert_same(load_state_dict(tmp_path / "right.pt", use_ema=False), state)
    torch.save({"generator": state, "critic": state, "generator_ema": state}, tmp_path / "start.pt")
    assert_same(load_state_dict(tmp_path / "start.pt"), state)
    torch.save({"critic": state, "step": 3}, tmp_path / "critic.pt")
    with pytest.raises(UserError, match=r"critic.pt: holds a critic but no generator"):
        load_state_dict(tmp_path / "critic.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_windows_of_any_size_give_the_same_tensors(tmp_path, monkeypatch, suffix):
    """Large files are mapped piece by piece. A piece may hold many tensors, one tensor, or a part of one."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    sizes = ((), (0, 3), (1,), (700,), (40, 31), (5, 3, 2))
    state = {
        f"{number}.{size}": (torch.rand(size, generator=generator) * 100).to(dtype)
        for number, dtype in enumerate(dtypes)
        for size in sizes
    }
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"critic": {"a": torch.zeros(3000)}, "generator": state}, path)
    else:
        save_safetensors(path, state)
        assert_same(load_file(path), state)
    for size in (1, 4096, 10_000, 2**27):
        monkeypatch.setattr("model.weights.mapping.WINDOW_BYTES", size)
        assert_same(load_state_dict(path), state)


def test_a_pytorch_file_is_mapped_in_windows_although_torch_maps_it_whole(tmp_path, monkeypatch):
    """Otherwise every page that was read for conversion would stay in memory until the last tensor is freed."""
    mapped = []
    map_tensors = torch_file.map_tensors
    monkeypatch.setattr(
        torch_file, "map_tensors", lambda path, entries: mapped.append(path) or map_tensors(path, entries)
    )
    path = tmp_path / "w.pt"
    torch.save(
        {"critic": {"a": torch.zeros(9)}, "generator": {"b": torch.ones(3)}, "step": 3, "none": torch.zeros(0)}, path
    )
    assert_same(load_state_dict(path), {"b": torch.ones(3)})
    assert mapped == [path]


def test_tensors_of_a_pytorch_file_that_share_memory_or_are_views_are_read_as_they_are(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {"whole": base, "tied": base, "part": base[1:3], "turned": base.T}
    torch.save(state, tmp_path / "views.pt")
    assert_same(load_state_dict(tmp_path / "views.pt"), state)
    del state["turned"]
    torch.save(state, tmp_path / "tied.pt")
    assert_same(load_state_dict(tmp_path / "tied.pt"), state)


def test_a_comfyui_checkpoint_gives_its_diffusion_model_alone(tmp_path, state):
    whole = wrapped(state, "model.diffusion_model.") | {"text_encoders.a": torch.zeros(1), "vae.b": torch.zeros(1)}
    save_file(whole, tmp_path / "comfyui.safetensors")
    assert_same(load_state_dict(tmp_path / "comfyui.safetensors"), state)
    save_file(wrapped(state, "diffusion_model."), tmp_path / "short.safetensors")
    assert_same(load_state_dict(tmp_path / "short.safetensors"), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_weights_that_are_not_finite_are_refused(value, dtype):
    state = Tiny().state_dict()
    state["inner.weight"][2, 3] = value
    with pytest.raises(UserError, match=r"w.pt: the tensor 'inner.weight' holds NaN or infinity"):
        load_into(Tiny(), state, source="w.pt", dtype=dtype)


def test_values_too_large_for_half_precision_are_noticed():
    state = Tiny().state_dict()
    state["inner.bias"][0] = 1e5
    with pytest.raises(UserError, match=r"'inner.bias' holds NaN or infinity \(as float16\)"):
        load_into(Tiny(), dict(state), source="w.pt", dtype=torch.float16)
    load_into(Tiny(), dict(state), source="w.pt", dtype=torch.bfloat16)


def test_loading_empties_the_given_state_and_copies_only_what_is_converted(tmp_path):
    state = Tiny().state_dict()
    weight = state["inner.weight"]
    module = Tiny()
    load_into(module, state, source="w.pt", dtype=torch.float32)
    assert not state
    assert module.inner.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("wan_models/Wan2.1-T2V-1.3B", "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B"),
        ("/a/Wan2.1-T2V-14B/Wan2.1_VAE.pth", "hf download Wan-AI/Wan2.1-T2V-14B --local-dir /a/Wan2.1-T2V-14B"),
        (
            "checkpoints/self_forcing_dmd.pt",
            "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir .",
        ),
        ("b/checkpoints/ode_init.pt", "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir b"),
        (
            "checkpoints/taew2_1.pth",
            "curl -L --create-dirs -o checkpoints/taew2_1.pth "
            "https://github.com/madebyollin/taehv/raw/main/taew2_1.pth",
        ),
        (
            "checkpoints/chunkwise/causal_forcing.pt",
            "hf download zhuhz22/Causal-Forcing chunkwise/causal_forcing.pt --local-dir checkpoints",
        ),
        (
            "checkpoints/autoregressive_checkpoint/model.pt",
            "hf download tianweiy/CausVid autoregressive_checkpoint/model.pt --local-dir checkpoints",
        ),
        (
            "longlive_models/models/longlive_base.pt",
            "hf download Efficient-Large-Model/LongLive-1.3B --local-dir longlive_models",
        ),
        (
            "checkpoints/krea-realtime-video-14b.safetensors",
            "hf download krea/krea-realtime-video krea-realtime-video-14b.safetensors --local-dir checkpoints",
        ),
    ],
)
def test_a_missing_published_file_is_answered_with_the_command_that_downloads_it(tmp_path, monkeypatch, path, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_state_dict(path)
    looked = tmp_path / path
    expected = f"{path}: no such file or folder (looked for {looked}); download it: {command}"
    assert str(error.value) == expected


def test_pickled_code_is_refused_and_not_run(tmp_path, state):
    target = tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Code(target)}, tmp_path / "zip.pt")
    torch.save({"extra": Code(target)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Code(target), protocol=2))
    (tmp_path / "new.pt").write_bytes(pickle.dumps(Code(target), protocol=4))
    for name in ("zip.pt", "old.pt", "raw.pt", "new.pt"):
        with pytest.raises(UserError, match=f"{name}: (contains pickled|is a Python pickle).*nothing was run"):
            load_state_dict(tmp_path / name)
    assert not target.exists()


def hostile_files(folder, state):
    """Yield (path, text that its error must contain) for every damaged or wrong file."""
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
    yield folder / "tensor.pt", "holds a Tensor, not a state dict"
    torch.save({"step": 3}, folder / "number.pt")
    yield folder / "number.pt", "'step' is a int, not a tensor"
    torch.save({3: torch.zeros(1)}, folder / "unnamed.pt")
    yield folder / "unnamed.pt", "3 has a name that is not text"
    for name, tensor, message in (
        ("sparse", torch.eye(3).to_sparse(), "a torch.float32 tensor .torch.sparse_coo"),
        ("meta", torch.zeros(3, device="meta"), "a tensor without values"),
        ("complex", torch.zeros(3, dtype=torch.complex64), "a torch.complex64 tensor"),
    ):
        torch.save({"generator": {**state, "odd": tensor}}, folder / f"{name}.pt")
        yield folder / f"{name}.pt", f"its entry 'odd' is {message}"
    torch.save({}, folder / "nothing.pt")
    yield folder / "nothing.pt", "holds no tensors"
    torch.save({"model.a": torch.zeros(1), "a": torch.zeros(1)}, folder / "twice.pt")
    yield folder / "twice.pt", "two tensors have the name 'a'"
    (folder / "hollow").mkdir()
    yield folder / "hollow", "holds neither model.safetensors nor"
    key = next(iter(state))
    yield (write_shards(folder / "gone", state, {key: "part-9.safetensors"}), "'part-9.safetensors', which is missing")
    for number, name in enumerate(["../gone/part-0.safetensors", "/etc/hostname", "a\\..\\b"]):
        yield (write_shards(folder / f"out{number}", state, {key: name}), "outside its own folder")
    yield (
        write_shards(folder / "short", state, {**dict.fromkeys(state, "part-0.safetensors")}),
        "but no shard holds it",
    )
    (write_shards(folder / "bad", state) / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    yield folder / "bad", "is not JSON"


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
        load_into(Tiny(), dict(state), source="w.pt")
    assert str(error.value) == (
        "w.pt: does not fit Tiny: count (file: missing, model: (2,)); inner.weight (file: (5, 4), model: (3, 4)); "
        "inner.bias (file: (5,), model: (3,)) and 1 more"
    )


def test_quantised_weights_are_refused_and_whole_numbers_stay():
    state = Tiny().state_dict()
    state["inner.weight"] = state["inner.weight"].to(torch.int8)
    with pytest.raises(UserError, match=r"w.pt: the tensor 'inner.weight' is stored as torch.int8"):
        load_into(Tiny(), state, source="w.pt")


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


@pytest.mark.parametrize("shard_bytes", [1, 60, 10**9])
def test_shards_of_any_size_give_the_same_tensors_and_leave_no_earlier_ones(tmp_path, state, shard_bytes):
    state = {**state, "c": torch.arange(5), "d": torch.randn(3, 2).T}
    for size in (40, shard_bytes, shard_bytes):
        save_folder(tmp_path, state, {"a": 1}, shard_bytes=size)
        assert_same(load_state_dict(tmp_path), state)
    files = sorted(file.name for file in tmp_path.iterdir())
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) | {index.name} if index.exists() else set()
    assert set(files) == {"config.json"} | (named or {"model.safetensors"})
    assert len(named) == {1: 5, 60: 4, 10**9: 0}[shard_bytes]


def test_other_libraries_read_what_is_written(tmp_path, state):
    state = {**state, "odd": torch.ones(3, dtype=torch.uint8), "none": torch.zeros(0, 2), "scalar": torch.tensor(2.5)}
    save_folder(tmp_path, state, {})
    assert_same(load_file(tmp_path / "model.safetensors"), state)


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
