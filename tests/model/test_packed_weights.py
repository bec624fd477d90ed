"""Weights in fewer bits, with any prefix, have the values that the definition of their format gives."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.weights import load_into, load_state_dict, weights_hash
from model.weights.lora import LoRA, LowRank, merge_lora
from model.weights.packed import PackedTensor, unpack
from model.weights.transformer_read import open_transformer, read_transformer
from model.weights.write import save_safetensors
from tests.fake_release import SMALL, t5_state, transformer_state
from utils.errors import UserError

PRESET = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def state():
    return transformer_state(SMALL, 1)


def is_matrix(name, tensor):
    return name.startswith("blocks") and tensor.ndim == 2


def quantise(state, dtype, scale_name, granularity):
    """Return (the tensors of a file, the values that they represent)."""
    stored, values = {}, {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            stored[name] = values[name] = tensor
            continue
        limit = 127 if dtype is torch.int8 else torch.finfo(dtype).max
        if granularity == "block":
            grid = tensor.unflatten(0, (-1, 32)).unflatten(2, (-1, 64)).abs().amax(dim=(1, 3))
            scale = grid / limit
            full = scale.repeat_interleave(32, 0).repeat_interleave(64, 1)
        else:
            largest = tensor.abs().max() if granularity == "tensor" else tensor.abs().amax(dim=1, keepdim=True)
            full = scale = largest / limit
        quantised = tensor / full
        stored[name] = (quantised.round() if dtype is torch.int8 else quantised).to(dtype)
        values[name] = stored[name].float() * full
        layer = name.removesuffix(".weight")
        stored[f"{layer}.{scale_name}"] = scale[:, 0] if granularity == "row, flat" else scale
    return stored, values


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("granularity", ["tensor", "row", "row, flat", "block"])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "scale_weight"),
        (torch.float8_e5m2, "weight_scale"),
        (torch.float8_e4m3fn, "weight_scale_inv"),
        (torch.int8, "weight_scale"),
    ],
)
def test_a_scaled_weight_is_stored_times_scale(tmp_path, state, dtype, name, granularity, prefix):
    stored, values = quantise(state, dtype, name, granularity)
    stored |= {"blocks.0.self_attn.q.scale_input": torch.ones(1), "blocks.0.self_attn.k.input_scale": torch.ones(())}
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = {f"{prefix}{key}": tensor for key, tensor in stored.items()}
    save_safetensors(tmp_path / "w.safetensors", file)
    model = read_transformer(tmp_path / "w.safetensors", preset=PRESET, dtype=torch.float32)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[key]), key


def test_packed_weights_are_unpacked_one_by_one_in_the_wanted_type(tmp_path, state):
    stored, values = quantise(state, torch.float8_e4m3fn, "scale_weight", "tensor")
    save_safetensors(tmp_path / "w.safetensors", stored)
    model, packed = open_transformer(tmp_path / "w.safetensors", preset=PRESET)
    name = "blocks.0.ffn.0.weight"
    assert isinstance(packed[name], PackedTensor)
    assert packed[name].shape == values[name].shape
    assert torch.equal(packed[name].float() + 0, values[name])
    assert torch.equal(unpack(packed[name]), values[name].bfloat16())
    with pytest.raises(NotImplementedError, match="cannot write into a packed tensor"):
        packed[name].mul_(2)
    load_into(model, packed, source="w", dtype=None)
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}
    assert model.blocks[0].ffn[0].weight.dtype is torch.bfloat16


def test_a_lora_is_merged_into_packed_weights(tmp_path, state):
    stored, values = quantise(state, torch.float8_e4m3fn, "scale_weight", "row")
    save_safetensors(tmp_path / "w.safetensors", stored)
    packed = load_state_dict(tmp_path / "w.safetensors")
    layer = LowRank(torch.ones(1, SMALL.dim), torch.ones(SMALL.dim, 1), 0.5)
    merge_lora(packed, LoRA({"blocks.0.self_attn.q": layer}))
    assert torch.equal(packed["blocks.0.self_attn.q.weight"], (values["blocks.0.self_attn.q.weight"] + 0.5).bfloat16())


def test_the_hash_of_packed_weights_depends_on_values_and_scales(tmp_path, state):
    stored, _ = quantise(state, torch.float8_e4m3fn, "scale_weight", "tensor")
    hashes = set()
    for factor in (1.0, 1.0, 2.0):
        stored["blocks.0.self_attn.q.scale_weight"] *= factor
        save_safetensors(tmp_path / "w.safetensors", stored)
        hashes.add(weights_hash(tmp_path / "w.safetensors"))
    assert len(hashes) == 2


Q = "blocks.0.self_attn.q"
BAD_SCALES = {
    "no weight": ({"blocks.0.lost.scale_weight": torch.ones(())}, "belongs to no weight"),
    "shape": ({f"{Q}.scale_weight": torch.ones(7)}, r"\(7,\) does not fit a weight \(128, 128\)"),
    "not finite": ({f"{Q}.scale_weight": torch.tensor(float("inf"))}, "holds values that are not finite numbers"),
    "packed": ({f"{Q}.weight": torch.zeros(128, 64, dtype=torch.uint8)}, "packed in fewer than 8 bits"),
    "deep": ({f"{Q}.comfy_quant": torch.tensor(list(b"[" * 5000), dtype=torch.uint8)}, "is not JSON"),
    "format": (
        {f"{Q}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
        "is in the format nvfp4, which cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_a_scale_that_does_not_fit_is_one_line(tmp_path, state, case):
    stored, _ = quantise(state, torch.float8_e4m3fn, "scale_weight", "tensor")
    change, message = BAD_SCALES[case]
    save_safetensors(tmp_path / "w.safetensors", stored | change)
    with pytest.raises(UserError, match=message) as error:
        load_state_dict(tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)


PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "module.",
    "net.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "module.model._fsdp_wrapped_module._orig_mod.",
    "pipe.dit.",
    "student.any.thing.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_stands_before_all_names_is_dropped(tmp_path, state, prefix):
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    assert load_state_dict(tmp_path / "w.safetensors").keys() == state.keys()
    encoder = t5_state(120)
    expected = None
    for before in ("", prefix if prefix != "model.diffusion_model." else "model."):
        torch.save({f"{before}{name}": tensor for name, tensor in encoder.items()}, tmp_path / "t5.pth")
        loaded = load_state_dict(tmp_path / "t5.pth")
        assert expected is None or loaded.keys() == expected
        expected = loaded.keys()
        assert "shared.weight" in expected


def test_two_models_in_one_file_are_named(tmp_path, state):
    both = {f"{before}{name}": tensor.clone() for before in ("real.", "fake.") for name, tensor in state.items()}
    save_file(both, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"two.safetensors: holds the models 'fake.', 'real.'; give a file with one"):
        load_state_dict(tmp_path / "two.safetensors")


def test_files_and_folders_of_any_name_are_read_by_their_content(tmp_path, state):
    def assert_read(path):
        loaded = load_state_dict(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())

    for name in ("W.SAFETENSORS", "w.sft", "w.Pt", "w.bin", "w.ckpt", "w"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        if name.lower().endswith(("pt", "bin")):
            torch.save(state, folder / name)
        else:
            save_file(state, folder / name)
        assert_read(folder / name)
        if "." in name:
            (folder / "notes.txt").write_text("?")
            (folder / f"._{name}").write_bytes(b"macOS")
            assert_read(folder)
    (tmp_path / "w_sft" / "second.pt").write_bytes(b"?")
    with pytest.raises(UserError, match=r"holds 2 files of weights \(second.pt, w.sft\); name the one to read"):
        load_state_dict(tmp_path / "w_sft")


def write_gguf(path, state, arch, kinds, shapes=True):
    """Write a file like ComfyUI-GGUF's converter: 5 axes become 4, and a field holds the original shape."""
    writer = gguf.GGUFWriter(path, arch)
    values = {}
    for name, tensor in state.items():
        kind = kinds(name, tensor)
        if tensor.ndim > 4:
            if shapes:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            tensor = tensor.flatten(0, -4)
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind))).view(state[name].shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


KINDS = ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_transformer_has_the_values_of_the_gguf_package(tmp_path, state, kind):
    def kinds(name, tensor):
        return gguf.GGMLQuantizationType[kind if is_matrix(name, tensor) else "F32"]

    values = write_gguf(tmp_path / "wan.gguf", state, "wan", kinds)
    model = read_transformer(tmp_path / "wan.gguf", preset=PRESET, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name


def test_a_gguf_text_encoder_has_the_names_of_transformers(tmp_path):
    from model.weights.names import FOREIGN_NAMES, GGUF_T5_TO_TRANSFORMERS, rename_keys

    encoder = rename_keys(t5_state(120), FOREIGN_NAMES["token_embedding.weight"])
    theirs = rename_keys(encoder, tuple((ours, theirs) for theirs, ours in GGUF_T5_TO_TRANSFORMERS))
    assert "enc.blk.1.attn_rel_b.weight" in theirs
    write_gguf(tmp_path / "t5.gguf", theirs, "t5encoder", lambda *_: gguf.GGMLQuantizationType.F32)
    loaded = load_state_dict(tmp_path / "t5.gguf")
    assert loaded.keys() == encoder.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in encoder.items())


def test_a_quantised_vector_and_a_shape_that_is_no_shape(tmp_path):
    write_gguf(tmp_path / "v.gguf", {"a": torch.ones(64)}, "wan", lambda *_: gguf.GGMLQuantizationType.Q8_0)
    torch.testing.assert_close(load_state_dict(tmp_path / "v.gguf")["a"].float(), torch.ones(64), rtol=1e-3, atol=0)
    for shape in ([-8, -8], [64.0, 1.0], [63], ["64"], [0]):
        writer = gguf.GGUFWriter(tmp_path / "s.gguf", "wan")
        writer.add_array("comfy.gguf.orig_shape.a", shape)
        writer.add_tensor("a", torch.ones(8, 8).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=r"s.gguf: the shape .* does not fit a tensor .*; the file is damaged"):
            load_state_dict(tmp_path / "s.gguf")


def damaged_gguf(whole: bytes):
    """Yield (bytes, text that the error must contain)."""
    for share in (0.001, 0.2, 0.5, 0.99):
        yield whole[: int(len(whole) * share)], "truncated|damaged"
    yield whole[:8] + struct.pack("<QQ", 2**60, 1) + whole[24:], "cannot be read"
    yield whole[:8] + struct.pack("<QQ", 1, 2**60) + whole[24:], "cannot be read"
    yield whole[:24] + struct.pack("<Q", 2**62) + whole[32:], "truncated or damaged"
    yield whole[:4] + struct.pack("<I", 99) + whole[8:], "version 99"


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    path = tmp_path / "w.gguf"
    write_gguf(path, {"a": torch.ones(64, 64)}, "wan", lambda *_: gguf.GGMLQuantizationType.Q8_0)
    for data, message in damaged_gguf(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            load_state_dict(path)
        assert "w.gguf" in str(error.value)
        assert "\n" not in str(error.value)


def test_without_the_package_a_gguf_file_names_the_command_that_installs_it(tmp_path, monkeypatch):
    path = tmp_path / "w.gguf"
    write_gguf(path, {"a": torch.ones(4, 32)}, "wan", lambda *_: gguf.GGMLQuantizationType.F32)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"w.gguf: is a GGUF file; install the reader with: pip install gguf"):
        load_state_dict(path)


def test_a_comfy_quant_marker_of_fp8_is_understood(tmp_path, state):
    stored, values = quantise(state, torch.float8_e4m3fn, "weight_scale", "tensor")
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    stored[f"{Q}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_safetensors(tmp_path / "w.safetensors", stored)
    assert torch.equal(load_state_dict(tmp_path / "w.safetensors")[f"{Q}.weight"].float(), values[f"{Q}.weight"])
