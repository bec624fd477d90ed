"""The model of the demo: its choices, its refusals, and the commands that make its clips again."""

import importlib.util
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inference
from pipeline.serving.clips import Cue, Gallery
from pipeline.serving.hub import Hub
from pipeline.serving.loaded import offered_precisions
from pipeline.serving.messages import Start
from pipeline.serving.models import Models
from pipeline.serving.spec import ModelSource, short_names
from pipeline.steps import even_steps
from pipeline.storyboard import read_storyboard
from utils.cli import merged_overrides
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]
STEP_SECONDS = 0.5


@pytest.fixture(scope="module")
def models(release):
    stages = []
    models = Models(ModelSource(release.config_path))
    models.load(lambda stage, progress: stages.append((progress, stage)))
    assert stages == sorted(stages) and len(stages) > 3
    return models


def start(**fields) -> Start:
    return Start(type="start", prompt="a cat", **fields)


def test_defaults_are_the_models_own(models):
    spec, options = models.spec(start(), None), models.options()
    assert (spec.height, spec.width, spec.fps, spec.steps) == (48, 48, 12, None)
    assert options["decoders"] == ["TinyVAE"] and options["precisions"] == ["full"] and not options["compile"]
    assert options["examples"]


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 50},
        {"width": 4800},
        {"decoder": "none"},
        {"precision": "fp8"},
        {"compile": True},
        {"steps": 9},
        {"num_frames": 7},
    ],
)
def test_what_is_not_on_offer_is_refused(models, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        models.spec(start(**fields), None)


def test_typed_prompts_are_not_kept_on_disk(models):
    assert models._loaded.config.text_encoder.cache is None


def test_a_stream_gives_its_chunks(models):
    session = models.open(models.spec(start(num_frames=6, steps=2), None))
    assert [session.decode(session.denoise()).frames.shape for _ in range(2)] == [(9, 48, 48, 3), (12, 48, 48, 3)]
    assert session.denoise() is None


def test_streams_made_as_a_batch_are_those_made_alone(models):
    specs = [models.spec(start(num_frames=6, seed=seed), None) for seed in (1, 2)]
    together = [models.open(spec) for spec in specs]
    for _ in range(2):
        blocks = models.denoise_batch(together)
        for spec, block in zip(specs, blocks, strict=True):
            alone = models.open(spec)
            for _ in range(block.index + 1):
                expected = alone.denoise()
            torch.testing.assert_close(block.latents, expected.latents, atol=1e-4, rtol=1e-4)


def command_of(models, cues=(), latents=6, **fields) -> list[str]:
    image = b"" if fields.pop("with_image", False) else None
    return models.command(models.spec(start(**fields), image), list(cues), latents, Path("clips/cat-0123.mp4"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["--prompt=a cat", "--seed=0", "--num_output_frames=6", "--fps=12", "--output_folder=videos/0123"]),
        ({"seed": 5, "fps": 24}, ["--seed=5", "--fps=24"]),
        ({"steps": 2}, ["rollout.denoising_steps=[1000.0, 500.0]"]),
        ({"with_image": True}, ["--i2v", "--data_path=clips/cat-0123.jsonl"]),
        ({"cues": [Cue(1.75, "a dog", "recache")]}, ["--switch=1.750s: a dog"]),
        ({"cues": [Cue(1.75, "a dog", "cut")]}, ["--switch=1.750s: a dog", "--switch_style=cut"]),
        ({"cues": [Cue(1, "a dog", "cut"), Cue(2, "a cow", "keep")]}, ["--storyboard=clips/cat-0123.yaml"]),
    ],
)
def test_commands_say_what_is_not_usual(models, fields, expected):
    """inference.py can read each command."""
    python, script, *arguments = command_of(models, **fields)
    assert (python, script) == ("python", "inference.py")
    assert set(expected) <= set(arguments)
    inference.parse_arguments(arguments)


def test_a_command_gives_no_key_two_values(models, monkeypatch):
    """The settings of the demo are in the command, but for those that the clip has a value of its own for."""
    settings = ("rollout.window=9", "video.fps=8", "video.num_frames=21", "inference.seed=3")
    monkeypatch.setattr(models, "_source", replace(models._source, settings=settings))
    args = inference.parse_arguments(command_of(models)[2:])
    assert args.overrides == ["rollout.window=9"]
    assert "video.fps=12" in merged_overrides(args, inference.KEYS)


def test_one_of_two_models_is_in_memory(release, tmp_path):
    """Another model is loaded after the first one is freed, without a garbage collection by chance."""
    other = tmp_path / "other.yaml"
    other.write_text(f"{{defaults: [{release.config_path}], video: {{fps: 8}}}}")
    models = Models(ModelSource(release.config_path), ModelSource(str(other)))
    assert models.names == ["config", "other"] and models.chosen == "config"
    models.load(lambda *_: None)
    session = models.open(models.spec(start(), None))
    session.denoise()
    first = weakref.ref(session.pipeline.denoiser.transformer)
    del session
    left = []
    models.choose("other")
    models.load(lambda stage, _: left.append(first()) if stage == "loading the weights" else None)
    assert left == [None]
    assert models.chosen == "other" and models.options()["fps"] == 8
    assert f"--config_path={other}" in command_of(models)


def test_names_of_models_are_short_and_different(tmp_path):
    assert short_names(["configs/a/base.yaml", "configs/b/base.yaml"]) == ["a/base", "b/base"]
    assert short_names(["configs/wan2.1.yaml", "other/b.yaml"]) == ["wan2.1", "b"]
    assert len(set(short_names(["a/base.yaml", "a/base.yml"]))) == 2
    with pytest.raises(UserError, match="named twice"):
        short_names(["a.yaml", "b/../a.yaml"])


def test_storyboards_are_those_that_inference_reads(tmp_path):
    import yaml

    from pipeline.states import SwitchStyle

    cues = [Cue(1.75, "a dog: big", "cut"), Cue(13, "'a' cow", "keep")]
    path = tmp_path / "board.yaml"
    path.write_text(yaml.safe_dump([cue.entry for cue in cues]))
    read = read_storyboard(path, SwitchStyle.recache)
    assert [(cue.seconds, cue.prompt, cue.style.value) for cue in read] == [(c.at, c.prompt, c.style) for c in cues]


def test_steps_are_spread_evenly():
    assert even_steps(4) == [1000, 750, 500, 250]
    assert even_steps(3) == [1000, 667, 333]


def test_a_stop_takes_effect_within_one_step(models, tmp_path):
    """With steps of half a second and chunks of two seconds, a stream ends half a second after its stop."""
    transformer, ended, begun = models._loaded.base.denoiser.transformer, threading.Event(), threading.Event()
    slow = transformer.register_forward_pre_hook(lambda *_: (begun.set(), time.sleep(STEP_SECONDS))[-1])

    def deliver(message) -> None:
        if isinstance(message, dict) and message["type"] == "ended":
            ended.set()

    hub = Hub(1, Gallery(tmp_path, models.command))
    hub.ready(models.open)
    try:
        stream = hub.submit(models.spec(start(), None), deliver, "visitor", "session")
        assert begun.wait(10)
        stopped = time.monotonic()
        stream.stop()
        assert ended.wait(10)
        assert time.monotonic() - stopped < STEP_SECONDS + 0.3
    finally:
        slow.remove()
        hub.close()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao")
def test_another_precision_is_loaded_while_streams_go_on(models, monkeypatch):
    """A running stream keeps its denoiser. The next stream gets the other one."""
    monkeypatch.setattr("pipeline.serving.loaded.offered_precisions", lambda device: ["full", "int8"])
    running = models.open(models.spec(start(), None))
    running.denoise()
    denoiser = running.pipeline.denoiser
    spec = models.spec(start(precision="int8"), None)
    models.prepare(spec)
    other = models.open(spec)
    assert other.denoise() is not None and other.pipeline.denoiser is not denoiser
    assert running.denoise() is not None and running.pipeline.denoiser is denoiser
    assert models.open(models.spec(start(), None)).pipeline.denoiser is denoiser


@pytest.mark.gpu
def test_precisions_of_a_gpu():
    offered = offered_precisions(torch.device("cuda"))
    assert offered[0] == "full"
