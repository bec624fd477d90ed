"""Seed, steps and strength change while a stream runs, live and by a storyboard alike."""

from pathlib import Path

import pytest
import torch

from pipeline.request import PromptSwitch, StreamRequest
from pipeline.rollout import SwitchStyle
from pipeline.session import StreamSession
from pipeline.steps import even_steps
from pipeline.storyboard import read_storyboard, schedule
from pipeline.text_to_video import TextToVideo, load_pipeline
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]

PROMPT = "a large red circle"
FPS = 12


@pytest.fixture(scope="module")
def pipeline(release) -> TextToVideo:
    return load_pipeline(release.config(), device=torch.device("cpu"), dtype=torch.float32)


def request(**options) -> StreamRequest:
    return StreamRequest(prompt=PROMPT, height=48, width=48, **{"num_frames": 9} | options)


def frames(pipeline: TextToVideo, **options) -> list[torch.Tensor]:
    return [chunk.frames for chunk in StreamSession(pipeline, request(**options))]


@pytest.mark.parametrize(
    ("settings", "entry"),
    [({"seed": 5}, "seed: 5"), ({"denoising_steps": even_steps(2)}, "steps: 2")],
)
def test_a_setting_changes_with_the_next_chunk_and_a_storyboard_does_the_same(pipeline, tmp_path, settings, entry):
    plain = frames(pipeline)
    session = StreamSession(pipeline, request())
    live = [session.decode(session.denoise()).frames]
    session.switch(PROMPT, SwitchStyle.keep, **settings)
    live += [session.decode(block).frames for block in iter(session.denoise, None)]
    assert torch.equal(live[0], plain[0])
    assert not torch.equal(live[1], plain[1])
    board = tmp_path / "board.yaml"
    board.write_text(f"- {{at: {len(plain[0]) / FPS:.3f}s, prompt: {PROMPT}, style: keep, {entry}}}")
    switches = schedule(read_storyboard(board, SwitchStyle.recache), FPS)
    scheduled = frames(pipeline, switches=switches)
    assert all(torch.equal(one, other) for one, other in zip(live, scheduled, strict=True))


def test_the_passes_of_a_chunk_are_as_many_as_its_steps(pipeline):
    taken: list[float] = []
    switches = (PromptSwitch(PROMPT, SwitchStyle.keep, at_frame=9, denoising_steps=even_steps(2)),)
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, args, kwargs: taken.append(args[1][0, 0].item()),
                                                       with_kwargs=True)  # fmt: skip
    with hook:
        frames(pipeline, switches=switches)
    denoising = [timestep for timestep in taken if timestep > 0]
    assert len(denoising) == 4 + 2 + 2
    assert denoising[4:6] == denoising[6:8]


def test_strength_changes_how_far_the_stream_goes_from_its_source(pipeline):
    """With a strength that leaves one step only, the passes of later chunks are one each."""
    count = []
    source = torch.zeros(33, 3, 48, 48)
    switches = (PromptSwitch(PROMPT, SwitchStyle.keep, at_frame=9, strength=0.25),)
    with pipeline.denoiser.register_forward_pre_hook(lambda _, args: count.append(args[1][0, 0].item())):
        frames(pipeline, source=[source], strength=1.0, switches=switches)
    assert len([timestep for timestep in count if timestep > 0]) == 4 + 1 + 1


@pytest.mark.parametrize(
    "settings", [{"seed": 1.5}, {"seed": -1}, {"steps": 0}, {"steps": "many"}, {"blend_chunks": True}]
)
def test_settings_out_of_their_range_are_one_line(tmp_path, settings):
    import yaml

    board = Path(tmp_path / "board.yaml")
    board.write_text(yaml.safe_dump([{"at": "1s", "prompt": "a cat"} | settings]))
    with pytest.raises(UserError, match=f"entry 1: {next(iter(settings))}=.* must be a whole number"):
        read_storyboard(board, SwitchStyle.recache)


@pytest.mark.parametrize("settings", [{"strength": 0}, {"strength": 1.1}, {"denoising_steps": [1, 2]}])
def test_a_switch_refuses_what_a_stream_cannot_do(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PromptSwitch("a cat", **settings)
