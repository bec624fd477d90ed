"""A whole diffusers folder: our many-step sampler and diffusers' own WanPipeline make the same frames of it."""

import json

import numpy as np
import pytest
import torch

from pipeline import SelfForcingPipeline
from pipeline.config import Sampler
from pipeline.request import StreamRequest
from pipeline.sampling import UNIPC_FIRST_LEVEL
from pipeline.stream import initial_noise
from scripts.export import main as export
from tests.fake_release import copy_fake_release

PROMPT = "A stylish woman walks down a street."
SIZE = {"height": 32, "width": 48, "num_frames": 9}
OVERRIDES = ["text_encoder.cache=null", "sampling.steps=6", "sampling.negative_prompt=an octopus", "device=cpu"]
BOUND = 1e-4
"""The largest difference between frames in [0, 1]: float32 sums in another order. Measured: 3e-6."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bidirectional teacher as export.py writes it."""
    release = copy_fake_release(tmp_path_factory, tmp_path_factory.mktemp("fake"))
    out = tmp_path_factory.mktemp("exported") / "teacher"
    assert export([str(release.small), str(out), "--format", "diffusers", "--shift", "3"]) == 0
    return out


def ours(folder, *overrides: str) -> tuple[SelfForcingPipeline, np.ndarray]:
    pipeline = SelfForcingPipeline.from_pretrained(folder, device="cpu", overrides=[*OVERRIDES, *overrides])
    return pipeline, pipeline(PROMPT, **SIZE).frames


def theirs(folder, pipeline: SelfForcingPipeline) -> np.ndarray:
    """What diffusers makes of the same noise, on the grid of timesteps of Wan's own sampler.

    diffusers' grid begins at pure noise, Wan's just below it (UNIPC_FIRST_LEVEL).
    """
    from diffusers import WanPipeline

    request = StreamRequest(PROMPT, SIZE["height"], SIZE["width"], num_frames=3)
    like = pipeline.transformer.patch_embedding.weight
    (noise,) = initial_noise([request], [3], pipeline.parts.codec, like)
    wan = WanPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    wan.set_progress_bar_config(disable=True)
    sampling = pipeline.config.sampling
    levels = UNIPC_FIRST_LEVEL * (1 - np.arange(sampling.steps) / sampling.steps)
    set_timesteps = wan.scheduler.set_timesteps
    wan.scheduler.set_timesteps = lambda count, device: set_timesteps(device=device, sigmas=levels)
    return wan(
        prompt=PROMPT,
        negative_prompt=sampling.negative_prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        latents=noise.movedim(1, 2),
        **SIZE,
    ).frames


def test_diffusers_makes_the_frames_of_our_many_step_sampler(folder):
    pipeline, frames = ours(folder)
    assert pipeline.config.sampler is Sampler.many_step and pipeline.config.generator.shift == 3
    assert frames.shape == (1, 9, 32, 48, 3) and frames.std() > 0.05
    assert np.abs(frames - theirs(folder, pipeline)).max() < BOUND
    assert np.abs(frames - ours(folder, "sampling.guidance_scale=1")[1]).max() > 100 * BOUND


def test_a_saved_pipeline_is_a_whole_diffusers_folder(folder, tmp_path):
    pipeline, frames = ours(folder)
    pipeline.save_pretrained(tmp_path / "saved")
    names = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()} == names
    assert names < json.loads((tmp_path / "saved" / "model_index.json").read_text()).keys()
    assert np.abs(frames - theirs(tmp_path / "saved", pipeline)).max() < BOUND
    again = SelfForcingPipeline.from_pretrained(tmp_path / "saved", device="cpu", overrides=["text_encoder.cache=null"])
    assert np.array_equal(again(PROMPT, **SIZE).frames, frames)
