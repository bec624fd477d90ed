"""scripts/export.py from the command line: every pair of formats, whole pipelines, and refusals."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.text_encoder import TextEncoder
from model.wan_vae import WanVAE
from model.weights import load_state_dict, save_safetensors
from model.weights.lora import merge_lora
from model.weights.lora_read import load_lora
from model.weights.transformer_read import read_transformer
from model.weights.transformer_write import FORMATS
from scripts.export import main
from tests.fake_release import SMALL, FakeRelease, copy_fake_release

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> FakeRelease:
    return copy_fake_release(tmp_path_factory, tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def exported(release, tmp_path_factory) -> dict[str, Path]:
    """Give the averaged weights of self_forcing_dmd.pt in every format."""
    folder = tmp_path_factory.mktemp("exported")
    paths = {name: folder / f"{name}{kind.suffix}" for name, kind in FORMATS.items()}
    for name, path in paths.items():
        assert main([str(release.checkpoints / "self_forcing_dmd.pt"), str(path), "--format", name, "--ema"]) == 0
    return paths


def averaged(release):
    return load_state_dict(release.checkpoints / "self_forcing_dmd.pt", use_ema=True)


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.mark.parametrize(("source", "target"), permutations(FORMATS, 2))
def test_every_pair_of_formats_keeps_every_bit(release, exported, tmp_path, source, target):
    path = tmp_path / f"out{FORMATS[target].suffix}"
    assert main([str(exported[source]), str(path), "--format", target]) == 0
    assert_same(load_state_dict(path), averaged(release))
    assert read_transformer(path, preset="shapes").config == SMALL


def test_dtype_shards_and_raw_weights(release, tmp_path, capsys):
    source = str(release.checkpoints / "self_forcing_dmd.pt")
    assert main([source, str(tmp_path / "o"), "--format", "wan", "--dtype", "bfloat16", "--shard_gb", "0.0004"]) == 0
    raw = load_state_dict(source, use_ema=False)
    assert_same(load_state_dict(tmp_path / "o"), {name: tensor.bfloat16() for name, tensor in raw.items()})
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 3
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path / 'o'}: 0.5M parameters in 69 tensors, ")
    assert main([source, str(tmp_path / "h.safetensors"), "--format", "comfyui", "--dtype", "float16"]) == 0
    stored = load_file(tmp_path / "h.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(name.startswith("model.diffusion_model.") for name in stored)


@torch.no_grad()
def test_a_release_folder_becomes_a_whole_diffusers_pipeline(release, tmp_path):
    from diffusers import WanPipeline

    out = tmp_path / "pipeline"
    assert main([str(release.small), str(out), "--format", "diffusers"]) == 0
    pipeline = WanPipeline.from_pretrained(out, local_files_only=True)
    assert pipeline.scheduler.config.flow_shift == 5.0
    prompt = ["A stylish woman walks down a street."]
    video = pipeline(prompt=prompt, height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 5, 3, 32, 32)
    assert video.isfinite().all()

    ours = TextEncoder.from_files(out)
    original = TextEncoder.from_files(release.small / "models_t5_umt5-xxl-enc-bf16.pth", tokenizer=release.small)
    assert torch.equal(ours.encode(prompt), original.encode(prompt))
    latents = torch.randn(1, 2, 16, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        WanVAE.from_file(out).decode(latents), WanVAE.from_file(release.small / "Wan2.1_VAE.pth").decode(latents)
    )
    again = tmp_path / "again"
    assert main([str(out), str(again), "--format", "diffusers"]) == 0
    assert (again / "model_index.json").read_text() == (out / "model_index.json").read_text()


def test_parts_complete_a_checkpoint_and_their_absence_is_said(release, tmp_path, capsys):
    source = str(release.checkpoints / "self_forcing_dmd.pt")
    parts = ["--parts", str(release.small)]
    assert main([source, str(tmp_path / "a"), "--format", "diffusers", "--ema", *parts, "--shift", "8"]) == 0
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "README.md"} == {
        path.name for path in (tmp_path / "a").iterdir()
    }
    assert json.loads((tmp_path / "a/scheduler/scheduler_config.json").read_text())["flow_shift"] == 8
    assert main([source, str(tmp_path / "b"), "--format", "diffusers", "--ema"]) == 0
    assert "transformer only (--parts adds the rest)" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README.md", "transformer"]


def write_lora(path):
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, SMALL.dim, generator=generator), torch.randn(SMALL.dim, 2, generator=generator)
    layer = "lora_unet_blocks_0_self_attn_q"
    state = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    save_file(state, path)


def test_a_lora_is_merged_or_rewritten_for_peft(release, tmp_path):
    write_lora(tmp_path / "lora.safetensors")
    out = tmp_path / "merged.safetensors"
    lora = ["--lora", str(tmp_path / "lora.safetensors"), "--lora_scale", "0.5"]
    assert main([str(release.small), str(out), "--format", "safetensors", *lora]) == 0
    expected = load_state_dict(release.small)
    merge_lora(expected, load_lora(tmp_path / "lora.safetensors"), 0.5)
    assert_same(load_state_dict(out), expected)
    assert not torch.equal(
        load_state_dict(release.small)["blocks.0.self_attn.q.weight"], expected["blocks.0.self_attn.q.weight"]
    )
    assert main([str(tmp_path / "lora.safetensors"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert load_lora(tmp_path / "peft").layers.keys() == {"blocks.0.self_attn.q"}


def test_scaled_fp8_weights_are_exported_as_their_values(release, tmp_path):
    state = load_state_dict(release.small)
    name = "blocks.0.ffn.0.weight"
    scale = state[name].abs().max() / 448
    state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
    expected = state[name].float() * scale
    state["blocks.0.ffn.0.scale_weight"] = scale
    save_safetensors(tmp_path / "fp8.safetensors", state)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.safetensors"
        assert main([str(tmp_path / "fp8.safetensors"), str(out), "--format", "comfyui", "--dtype", dtype]) == 0
        assert torch.equal(load_state_dict(out)[name], expected.to(getattr(torch, dtype)))


def test_several_loras_are_merged_with_their_scales(release, tmp_path):
    write_lora(tmp_path / "lora.safetensors")
    path, out = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    assert main([str(release.small), str(out), "--format", "safetensors", "--lora", f"[{path}:0.5, {path}]"]) == 0
    expected = load_state_dict(release.small)
    merge_lora(expected, load_lora(path), 1.5)
    written = load_state_dict(out)
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor)


def refusals(release, folder):
    """Return (arguments, text that the error must contain) for each mistake."""
    small, official = str(release.small), str(release.checkpoints / "self_forcing_dmd.pt")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").touch()
    (folder / "cut.safetensors").write_bytes((release.small / "diffusion_pytorch_model.safetensors").read_bytes()[:-9])
    broken = load_state_dict(release.small)
    broken["head.head.bias"] = broken["head.head.bias"] * float("nan")
    save_file(broken, folder / "nan.safetensors")
    large = load_state_dict(release.small)
    large["head.head.bias"] = large["head.head.bias"] * 1e7
    save_file(large, folder / "large.safetensors")
    out = str(folder / "out.safetensors")
    single = [out, "--format", "safetensors"]
    yield ["wan_models/Wan2.1-T2V-1.3B", *single], "hf download Wan-AI/Wan2.1-T2V-1.3B"
    yield [str(folder / "cut.safetensors"), *single], "truncated or not a safetensors file"
    yield [str(folder / "nan.safetensors"), *single], "'head.head.bias' holds NaN or infinity"
    yield [str(folder / "large.safetensors"), *single, "--dtype", "float16"], "'head.head.bias' holds NaN or infinity"
    yield [str(release.small / "Wan2.1_VAE.pth"), *single], "not a Wan transformer"
    yield [str(release.checkpoints / "ode_init.pt"), *single, "--ema"], "has no generator_ema"
    yield [official, official, "--format", "official"], "is the input itself"
    yield [small, str(folder / "full"), "--format", "wan"], "exists; remove it"
    yield [small, str(folder / "out.pt"), "--format", "wan"], "the format wan is a folder"
    yield [small, str(folder / "p"), "--format", "diffusers", "--parts", str(folder)], "holds no text_encoder"
    yield [small, str(folder / "nan.safetensors/x"), "--format", "wan"], "cannot be written"
    yield [small, *single, "--lora", str(folder / "cut.safetensors")], "truncated"


def test_every_refusal_is_one_line_and_exit_code_2(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, message in refusals(release, tmp_path):
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert not printed.out


def test_the_script_runs_from_anywhere(release, tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts" / "export.py"), "no-such-folder", "out", "--format", "wan"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no-such-folder: no such file or folder")
