"""--vbench makes five videos for each prompt with VBench's names, measures drift, cuts clips, and calls VBench."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import evaluate
from scripts.runs.vbench import clips, cut_into_clips, lay_out
from utils.video.file import count_frames

PROMPTS = ["A red circle, moving up."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vbench")


def run(folder, *arguments: str) -> int:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return evaluate.main(
        [
            "--checkpoint=checkpoints/shapes/generator",
            f"--vbench={folder / 'videos'}",
            f"--data_path={prompts}",
            *arguments,
            "video.num_frames=6",
            "video.scale=1",
            "device=cpu",
        ]
    )


def test_five_videos_a_prompt_and_a_table(folder, capsys):
    assert run(folder, "--long") == 0
    videos = folder / "videos"
    names = {f"{prompt}-{index}" for prompt in PROMPTS for index in range(5)}
    assert {path.stem for path in videos.glob("*.mp4")} == names
    report = json.loads((videos / "evaluation.json").read_text())
    assert report["videos"] == 5 and report["drift"]["sharpness"]["first"] > 0
    assert "sharpness" in capsys.readouterr().out
    cut = sorted((videos / "split_clip" / f"{PROMPTS[0]}-0").iterdir())
    assert [path.name for path in cut] == [f"{PROMPTS[0]}-0_000.mp4"]
    assert [count_frames(path) for path in cut] == [21]


def test_a_second_run_makes_nothing_again_and_vbench_scores_it(folder, capsys, monkeypatch):
    asked = {}

    class VBench:
        def __init__(self, device, info, output):
            asked["output"] = output

        def evaluate(self, **options):
            asked.update(options)
            asked["found"] = sorted(file.name for file in Path(options["videos_path"]).iterdir())
            path = folder / "videos" / "vbench" / "scores_eval_results.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"imaging_quality": [0.5, []]}))

    module = ModuleType("vbench")
    module.VBench = VBench
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("vbench", None)
    monkeypatch.setitem(sys.modules, "vbench", module)
    before = {path: path.stat().st_mtime_ns for path in (folder / "videos").glob("*.mp4")}
    assert run(folder, "--dimensions", "imaging_quality") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "videos").glob("*.mp4")}
    assert asked["found"] == sorted(path.name for path in before), "VBench would take a contact sheet for a video"
    assert asked["mode"] == "custom_input" and asked["dimension_list"] == ["imaging_quality"]
    assert "imaging_quality  0.5000" in capsys.readouterr().out


def test_videos_of_other_weights_are_not_scored_under_the_same_names(folder, capsys):
    before = sorted((folder / "videos").iterdir())
    assert run(folder, "generator.weights=checkpoints/shapes/student") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{PROMPTS[0]}-0.mp4: is a video of other weights" in error and "another folder" in error
    assert sorted((folder / "videos").iterdir()) == before


def test_vbench_long_finds_the_clips_of_these_videos_alone(tmp_path):
    names = ["a-0", "a-1", "of another prompt-0"]
    for name in names:
        (tmp_path / "split_clip" / name).mkdir(parents=True)
        for file in (tmp_path / f"{name}.mp4", tmp_path / "split_clip" / name / f"{name}_000.mp4"):
            file.write_bytes(name.encode())
    for _ in range(2):  # a second run finds the folder of the first
        laid = lay_out([tmp_path / f"{name}.mp4" for name in names[:2]], tmp_path, long=True)
    files = {path.relative_to(laid).as_posix() for path in laid.rglob("*") if path.is_file()}
    assert files == {"a-0.mp4", "a-1.mp4", "split_clip/a-0/a-0_000.mp4", "split_clip/a-1/a-1_000.mp4"}


def test_a_clip_that_is_older_than_its_video_is_cut_again(tmp_path):
    frames = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    video = tmp_path / "a-0.mp4"
    video.write_bytes(b"video")
    (clip,) = cut_into_clips(video, frames, 8, tmp_path / "clips")
    os.utime(video, ns=(0, 0))
    before = clip.stat().st_mtime_ns
    cut_into_clips(video, frames, 8, tmp_path / "clips")
    assert clip.stat().st_mtime_ns == before
    os.utime(video)
    os.utime(clip, ns=(0, 0))
    cut_into_clips(video, frames, 8, tmp_path / "clips")
    assert clip.stat().st_mtime_ns > 0


def test_an_option_of_vbench_alone_is_refused(capsys):
    assert evaluate.main(["--checkpoint=checkpoints/shapes/generator", "--long"]) == 2
    assert "--long belongs to --vbench" in capsys.readouterr().err


def test_clips_cover_all_frames_and_are_equally_long():
    pieces = list(clips(torch.arange(33), 24))
    assert [len(piece) for piece in pieces] == [24, 24] and int(pieces[-1][-1]) == 32
    assert [len(piece) for piece in clips(torch.arange(10), 24)] == [10]


def test_without_prompts_it_says_what_is_missing(capsys):
    assert evaluate.main(["--checkpoint=checkpoints/shapes/generator", "--vbench=x"]) == 2
    assert "--data_path" in capsys.readouterr().err
