"""The pipeline is called like one of diffusers. A folder that it has written gives the same pipeline again."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import SelfForcingPipeline
from pipeline.config import PipelineConfig, load_pipeline_config
from pipeline.generation import generate
from pipeline.request import StreamRequest
from utils.errors import UserError
from utils.video.read import read_video

SHAPES = "checkpoints/shapes"
PROMPT = "a large red circle moving up on a white background"
SHORT = {"num_frames": 21}


@pytest.fixture(scope="module")
def pipeline() -> SelfForcingPipeline:
    return SelfForcingPipeline.from_pretrained(SHAPES, device="cpu", overrides=["text_encoder.cache=null"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_shipped_folder_says_what_its_configuration_says():
    stored = load_pipeline_config(f"{SHAPES}/pipeline.yaml")
    config = load_pipeline_config("configs/shapes/self_forcing_dmd.yaml")
    for section in ("generator", "codec", "text_encoder"):
        assert f"{SHAPES}/{getattr(stored, section).weights}" == getattr(config, section).weights
        getattr(stored, section).weights = getattr(config, section).weights
    stored.inference = config.inference
    assert stored == config


def test_each_output_type_holds_the_same_video(pipeline):
    by_type = {kind: pipeline(PROMPT, output_type=kind, **SHORT).frames for kind in ("np", "pt", "pil", "latent")}
    frames = by_type["np"]
    assert frames.shape == (1, 21, 48, 48, 3) and frames.min() >= 0 and frames.max() <= 1
    assert np.array_equal(by_type["pt"].movedim(2, -1).numpy(), frames)
    assert np.array_equal(np.stack(by_type["pil"][0]), np.rint(255 * frames[0]).astype(np.uint8))
    assert by_type["latent"].shape == (1, 6, pipeline.parts.codec.latent_channels, 12, 12)
    expected = generate(pipeline.parts, [StreamRequest(PROMPT, 48, 48, num_frames=6)])
    assert torch.equal(by_type["pt"], (expected / 2 + 0.5).clamp(0, 1))


def test_the_generator_decides_the_video(pipeline):
    first, again, other = (pipeline(PROMPT, generator=seeded(seed), **SHORT).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    one = seeded(1)
    videos = [pipeline(PROMPT, generator=one, **SHORT).frames for _ in range(2)]
    assert not np.array_equal(*videos), "a generator that is used twice gives two videos, as in diffusers"


def test_several_prompts_and_a_first_image(pipeline):
    image = Image.new("RGB", (64, 64), (0, 0, 120))
    frames = pipeline(
        [PROMPT, "a small blue square moving down on a navy background"], image=image, num_frames=25
    ).frames
    assert frames.shape == (2, 25, 48, 48, 3)
    assert abs(frames[:, 0, ..., 2].mean() - 120 / 255) < 0.1 and frames[:, 0, ..., 0].mean() < 0.1


def test_the_callback_sees_every_denoising_pass(pipeline):
    seen = []
    frames = pipeline(PROMPT, callback_on_step_end=lambda *call: seen.append(call), **SHORT).frames
    assert [index for _, index, _, _ in seen] == list(range(2 * 4))
    assert [round(timestep) for _, _, timestep, _ in seen] == [1000, 938, 833, 625] * 2
    shape = (1, 3, pipeline.parts.codec.latent_channels, 12, 12)
    assert all(call[3]["latents"].shape == shape and call[0] is pipeline for call in seen)
    assert np.array_equal(frames, pipeline(PROMPT, **SHORT).frames)


def test_a_stream_yields_the_video_chunk_by_chunk(pipeline):
    chunks = [chunk.frames for chunk in pipeline.stream(PROMPT, num_frames=21)]
    assert [len(chunk) for chunk in chunks] == [9, 12]
    stream = pipeline.stream(PROMPT)
    assert torch.equal(next(stream).frames, chunks[0])
    stream.close()


def test_a_saved_folder_makes_the_same_video(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    copy = SelfForcingPipeline.from_pretrained(tmp_path / "copy", device="cpu", overrides=["text_encoder.cache=null"])
    assert np.array_equal(copy(PROMPT, **SHORT).frames, pipeline(PROMPT, **SHORT).frames)
    assert (tmp_path / "copy" / "transformer" / "config.json").is_file()
    card = (tmp_path / "copy" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: diffusers" in card and "1.5 million" in card


def test_a_lora_is_merged_and_taken_out_again_and_offloading_changes_nothing(tmp_path):
    own = SelfForcingPipeline.from_pretrained(SHAPES, device="cpu", overrides=["text_encoder.cache=null"])
    plain = own(PROMPT, output_type="pt", **SHORT).frames
    name = "blocks.0.self_attn.q"
    rows, columns = own.transformer.state_dict()[f"{name}.weight"].shape
    down, up = torch.randn(2, columns, generator=seeded()), torch.randn(rows, 2, generator=seeded(1))
    weights = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(weights, tmp_path / "lora.safetensors")
    own.load_lora_weights(tmp_path / "lora.safetensors", scale=0.5)
    assert not torch.equal(own(PROMPT, output_type="pt", **SHORT).frames, plain)
    own.unload_lora_weights()
    assert torch.equal(own(PROMPT, output_type="pt", **SHORT).frames, plain)
    own.enable_model_cpu_offload()
    assert torch.allclose(own(PROMPT, output_type="pt", **SHORT).frames, plain, atol=0.02)


def test_diffusers_writes_the_frames_to_a_video(pipeline, tmp_path):
    from diffusers.utils import export_to_video

    frames = pipeline(PROMPT, **SHORT).frames
    export_to_video(list(frames[0]), str(tmp_path / "video.mp4"), fps=12)
    assert len(read_video(tmp_path / "video.mp4")) == 21


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "nowhere"])
def test_what_is_neither_a_folder_nor_a_name_on_the_hub_is_one_line(name):
    with pytest.raises(UserError, match="no such folder"):
        SelfForcingPipeline.from_pretrained(name)


def test_a_hub_name_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot be downloaded"):
        SelfForcingPipeline.from_pretrained("user/model", local_files_only=True)


def test_a_folder_of_something_else_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither pipeline"):
        SelfForcingPipeline.from_pretrained(tmp_path)


def test_an_unknown_output_type_is_refused(pipeline):
    with pytest.raises(ValueError, match="output_type='gif'"):
        pipeline(PROMPT, output_type="gif")


def test_a_diffusers_folder_names_its_parts(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    config = SelfForcingPipeline.from_pretrained(tmp_path).config
    assert isinstance(config, PipelineConfig) and config.codec.weights == str(tmp_path / "vae")
