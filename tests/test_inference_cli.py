"""inference.py from the command line: the files that it writes and keeps, and the mistakes that it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import inference
from model.weights import load_state_dict, weights_hash
from pipeline.config import load_pipeline_config
from pipeline.inference.options import FILES
from pipeline.loading import load_codec
from pipeline.memory import GB, PROFILES, measured_sizes, need
from scripts.endurance.kills import launch, log_file
from tests.inference_parts import REPOSITORY, end, records, same, snapshot, start, videos, wait_for
from utils.files import safe_stem
from utils.shapes import ATTRIBUTES
from utils.video.read import read_video

pytest_plugins = ["tests.shapes_parts", "tests.inference_parts"]


def test_a_run_makes_one_video_a_prompt_a_contact_sheet_and_a_record_each(make, release):
    folder = make()
    assert videos(folder) == sorted(f"{safe_stem(prompt)}-0.mp4" for prompt in release.prompts)
    for name in videos(folder):
        assert read_video(folder / name).shape == (1 + 4 * (6 - 1), 96, 96, 3)
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.height > len(release.prompts) * 100
    assert [record["prompt"] for record in records(folder)] == release.prompts
    for record in records(folder):
        assert (folder / record["file"]).is_file()
        assert (record["seed"], record["sample"], record["frames"], record["image"]) == (0, 0, 21, None)
        assert record["seconds"] > 0 and record["frames_per_second"] > 0
        assert record["weights"] == weights_hash(release.folder / "generator")
        assert record["settings"]["rollout"]["window"] == 6 and record["settings"]["video"]["height"] == 48


def test_a_rerun_keeps_what_exists_and_overwrite_makes_it_again(make):
    folder = make("--prompt", "a red circle", "--prompt", "a blue square")
    made = {name: (folder / name).stat().st_mtime_ns for name in videos(folder)}
    (folder / videos(folder)[0]).unlink()
    make("--prompt", "a red circle", "--prompt", "a blue square")
    times = {name: (folder / name).stat().st_mtime_ns for name in videos(folder)}
    assert [times[name] == made[name] for name in sorted(made)] == [False, True]
    make("--prompt", "a red circle", "--prompt", "a blue square", "--overwrite")
    assert all((folder / name).stat().st_mtime_ns > times[name] for name in made)
    assert sorted(record["file"] for record in records(folder)) == sorted(made)


def test_a_rerun_with_nothing_to_do_loads_no_model(make, monkeypatch):
    arguments = ("--prompt", "a red circle", "--prompt", "a blue square")
    before = snapshot(make(*arguments))

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pipeline.text_to_video.load_denoiser", loaded)
    assert snapshot(make(*arguments)) == before


def test_a_seed_decides_the_video(make):
    folders = [make("--prompt", "a cat", "--seed", seed, folder=f"{run}") for run, seed in enumerate("001")]
    first, again, other = (folder / "a cat-0.mp4" for folder in folders)
    assert same(first, again) and not same(first, other)


def test_num_samples_makes_different_videos_and_index_names_follow_the_official_ones(make):
    folder = make("--num_samples", "2", "--save_with_index", "--prompt", "a/b", "--prompt", "c")
    assert videos(folder) == ["0-0_regular.mp4", "0-1_regular.mp4", "1-0_regular.mp4", "1-1_regular.mp4"]
    assert not same(folder / "0-0_regular.mp4", folder / "0-1_regular.mp4")


def test_extended_prompts_are_generated_under_the_short_names(make, release, tmp_path):
    extended = [f"{prompt}, slowly, in bright light" for prompt in release.prompts]
    (tmp_path / "long.txt").write_text("\n".join(extended), encoding="utf-8")
    folder = make("--extended_prompt_path", str(tmp_path / "long.txt"))
    assert videos(folder) == sorted(f"{safe_stem(prompt)}-0.mp4" for prompt in release.prompts)
    assert [record["prompt"] for record in records(folder)] == extended
    direct = make("--prompt", extended[0], folder="direct")
    assert same(folder / f"{safe_stem(release.prompts[0])}-0.mp4", direct / f"{safe_stem(extended[0])}-0.mp4")


def test_equal_names_with_different_extended_prompts_are_all_made(make, tmp_path):
    (tmp_path / "short.txt").write_text("a cat\na cat\n")
    (tmp_path / "long.txt").write_text("a cat sleeps\na cat runs\n")
    folder = make("--data_path", str(tmp_path / "short.txt"), "--extended_prompt_path", str(tmp_path / "long.txt"))
    assert sorted(record["prompt"] for record in records(folder)) == ["a cat runs", "a cat sleeps"]
    assert len(videos(folder)) == 2


def test_names_are_safe_for_any_prompt(make):
    prompts = ["../up/and away", "🐈 on a 🛹", "very " * 60 + "long", "con", "A Cat", "a cat"]
    folder = make(*(word for prompt in prompts for word in ("--prompt", prompt)), "--num_output_frames", "3")
    assert len(videos(folder)) == len(prompts)
    assert all(len(name.encode()) < 120 for name in videos(folder))
    assert sorted(record["prompt"] for record in records(folder)) == sorted(prompts)


def test_flags_and_dotted_overrides_reach_the_rollout(make):
    folder = make(
        "rollout.frames_per_chunk=1", "--prompt", "a cat", "rollout.window=2", "--num_output_frames", "4", "--fps", "5"
    )
    assert len(read_video(folder / "a cat-0.mp4")) == 13
    settings = records(folder)[0]["settings"]
    assert (settings["rollout"]["frames_per_chunk"], settings["rollout"]["window"]) == (1, 2)
    assert (settings["video"]["num_frames"], settings["video"]["fps"]) == (4, 5)


def test_dry_run_prints_a_configuration_that_reads_back(release, tmp_path, capsys, no_weights):
    overrides = ["rollout.window=9", "video.num_frames=12", f"inference.output_folder={tmp_path / 'dry'}"]
    assert inference.main(["--config_path", release.config_path, "--dry-run", *overrides]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    whole, part = release.config(*overrides), load_pipeline_config(printed)
    assert all(getattr(part, field.name) == getattr(whole, field.name) for field in fields(part))
    assert not (tmp_path / "dry").exists()


def test_i2v_starts_from_the_image_and_the_default_length_makes_room_for_it(make, release, tmp_path):
    colours = {"green": (20, 220, 60), "purple": (190, 40, 200)}
    lines = []
    for name, colour in colours.items():
        Image.new("RGB", (40, 20), colour).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "prompt": name}))
    (tmp_path / "images.jsonl").write_text("\n\n".join(lines))
    folder = make("--i2v", "--data_path", str(tmp_path / "images.jsonl"))
    codec = load_codec(release.config().codec)
    for name, colour in colours.items():
        frames = read_video(folder / f"{name}-0.mp4").float()
        assert len(frames) == 1 + 4 * 6
        image = (torch.tensor(colour) / 127.5 - 1)[None, None, :, None, None].expand(1, 1, 3, 48, 48)
        with torch.no_grad():
            decoded = (codec.decode(codec.encode(image))[0, 0].mean((1, 2)) + 1) * 127.5
        assert (frames[0].mean((0, 1)) - decoded).abs().max() < 8
    assert [Path(record["image"]).name for record in records(folder)] == ["green.png", "purple.png"]
    first_frames = [read_video(folder / f"{name}-0.mp4")[0].float() for name in colours]
    assert (first_frames[0] - first_frames[1]).abs().mean() > 30


def test_ema_weights_are_taken_from_a_checkpoint_on_request(make, release, tmp_path):
    folders = {"generator": "generator", "generator_ema": "student"}
    states = {name: load_state_dict(release.folder / folder) for name, folder in folders.items()}
    torch.save({**states, "critic": states["generator"], "step": 3}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_bytes((release.folder / "generator" / "config.json").read_bytes())
    for flags, folder, kind in (((), "generator", "regular"), (("--use_ema",), "student", "ema")):
        made = make("--checkpoint_path", str(tmp_path / "checkpoint.pt"), "--prompt", "x", "--save_with_index", *flags)
        record = next(record for record in records(made) if record["file"] == f"0-0_{kind}.mp4")
        assert record["weights"] == weights_hash(release.folder / folder)


def test_a_switch_changes_the_prompt_at_its_time(make):
    long = ("--prompt", "a red circle", "--num_output_frames", "9", "--fps", "8")
    plain, folder = make(*long), make(*long, "--switch", "1s: a cat", "--switch", "2.7s: a dog", folder="switched")
    (name,) = videos(folder)
    assert name == "a red circle, 1s recache a cat, 2.7s recache a dog-0.mp4"
    before, after = (read_video(path).float() for path in (plain / videos(plain)[0], folder / name))
    assert len(after) == 33
    assert (before[:8] - after[:8]).abs().mean() < 1  # of one chunk; the video is compressed across its end
    assert (before[9:21] - after[9:21]).abs().mean() > 5
    assert records(folder)[0]["switches"] == [
        {"at": 1.0, "prompt": "a cat", "style": "recache"},
        {"at": 2.7, "prompt": "a dog", "style": "recache"},
    ]


def test_a_storyboard_is_what_the_same_switches_are(make, tmp_path):
    (tmp_path / "story.yaml").write_text("- {at: 0, prompt: a red circle}\n- {at: 1s, prompt: a cat, style: cut}\n")
    told = make("--storyboard", str(tmp_path / "story.yaml"))
    switched = make("--prompt", "a red circle", "--switch", "1s: a cat", "--switch_style", "cut", folder="switched")
    assert videos(told) == videos(switched)
    assert same(told / videos(told)[0], switched / videos(told)[0])
    assert len(read_video(told / videos(told)[0])) == 21  # at 12 frames a second the cut comes after its end


def test_a_video_is_extended_and_followed(make):
    folder = make("--prompt", "a red circle", "--num_output_frames", "6")
    video = folder / "a red circle-0.mp4"
    longer = make("--prompt", "a cat", "--num_output_frames", "3", "--extend", str(video), folder="longer")
    (name,) = videos(longer)
    before, after = read_video(video).float(), read_video(longer / name).float()
    assert len(after) == 21 + 12
    assert (before - after[:21]).abs().mean() < 12 < (before - after[:21].flip(0)).abs().mean()  # it is scaled twice
    assert records(longer)[0]["extends"] == str(video)
    made = {"plain": make("--prompt", "a cat", "--num_output_frames", "6", folder="plain")}
    for strength in ("0.3", "1"):
        made[strength] = make("--prompt", "a cat", "--v2v", str(video), "--strength", strength, folder=strength)
    plain, near, free = (path / videos(path)[0] for path in made.values())
    assert same(free, plain) and not same(near, plain)
    assert len(read_video(near)) == 21
    assert records(made["0.3"])[0]["follows"] == {"video": str(video), "strength": 0.3}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_what_was_made_playable(release, tmp_path, number):
    folder = tmp_path / "videos"
    process = start(release, folder, "--prompt", "a cat", "--num_output_frames", "30000")
    video, part = folder / "a cat-0.mp4", folder / "a cat-0.partial.mp4"
    wait_for(process, folder, lambda: part.exists() and part.stat().st_size > 20_000)
    os.kill(process.pid, number)
    code, errors = end(process, folder, 30)
    assert "Traceback" not in errors
    if number is signal.SIGKILL:
        assert code == -number and not video.exists()
        assert len(read_video(part)) >= 12
        return
    assert code == 128 + number
    assert not video.exists() and len(read_video(part)) > 12
    assert f"{part} can be played" in errors
    assert {path.name for path in folder.iterdir()} == {part.name, ".lock"}


def write_mistakes(folder: Path) -> None:
    """Write files that are each wrong in one way."""
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "one.txt").write_text("only one line\n")
    (folder / "a_file").write_text("in the way")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x80")
    (folder / "images.jsonl").write_text('\n{"image": "nowhere.png", "prompt": "a cat"}\n')
    (folder / "numbers.jsonl").write_text('{"image": "a_file", "prompt": 3}\n')
    (folder / "late.yaml").write_text("- {at: 1s, prompt: a}\n- {at: 1s, prompt: b}\n")
    (folder / "time.yaml").write_text("- {at: soon, prompt: a}\n")
    (folder / "style.yaml").write_text("- {at: 0, prompt: a}\n- {at: 1, prompt: b, style: fade}\n")
    (folder / "story.yaml").write_text("- {at: 0, prompt: a}\n")
    (folder / "map.yaml").write_text("at: 0\n")
    (folder / "later.yaml").write_text("- {at: 1s, prompt: a}\n")
    (folder / "seeded.yaml").write_text("- {at: 0s, prompt: a, seed: 3}\n")
    (folder / "list.json").write_text('["a cat"]')
    (folder / "junk.pt").write_text("<html>not found</html>")


LONG_PATHS = (
    "--checkpoint_path",
    "--data_path",
    "--extended_prompt_path",
    "--output_folder",
    "--storyboard",
    "--extend",
    "--v2v",
    "--config_path",
)
BAD_INPUT = {
    "prompt beside a file": (["--prompt", "a", "--data_path", "x"], "--prompt and --data_path both give prompts"),
    "more videos than a run can hold": (["--num_samples", "999999999"], "2999999997 videos are too many for one run"),
    "prompt beside a key": (["--prompt", "a", "inference.data_path=x"], "--prompt and --data_path both give prompts"),
    **{
        f"two values of {key}": ([f"--{option}", "8", f"{key}=9"], f"--{option} 8 and {key}=9 give one key two values")
        for option, key in inference.KEYS.items() if option != "output_folder"
    },
    **{f"nothing for {option}": ([f"--{option}", ""], f"--{option} is empty") for option in inference.KEYS},
    "negative seed": (["--seed", "-5"], "seed=-5 must be at least 0, or -1 to draw one"),
    "a video that no disk holds": (["--num_output_frames", "999999999999"], "choose another --output_folder or fewer"),
    "a rate that is no number": (["--fps", "nan"], "video.fps='nan' is not of type"),
    "a seed at 0s": (["--storyboard", "{tmp}/seeded.yaml"], "seeded.yaml: the entry at 0s has seed"),
    "storyboard without a beginning": (["--storyboard", "{tmp}/later.yaml"], "later.yaml: has no prompt at 0s"),
    "prompts in JSON": (["--data_path", "{tmp}/list.json"], "list.json: a .json file cannot be read as prompts"),
    **{
        f"a path that is too long: {flag}": ([flag, "{tmp}/" + "x" * 5000], "xxx")
        for flag in LONG_PATHS
    },
    "missing checkpoint": (["--checkpoint_path", "{tmp}/nowhere.pt"], "{tmp}/nowhere.pt: no such file"),
    "missing codec": (["codec.weights={tmp}/nowhere"], "{tmp}/nowhere: no such file"),
    "missing text encoder": (["text_encoder.weights=null"], "text_encoder.weights is null"),
    "empty prompt file": (["--data_path", "{tmp}/empty.txt"], "{tmp}/empty.txt: holds no prompt"),
    "missing prompt file": (["--data_path", "{tmp}/nowhere.txt"], "{tmp}/nowhere.txt: no such prompt file"),
    "a folder of prompts": (["--data_path", "{tmp}"], "{tmp}: no such prompt file"),
    "prompts that are not text": (["--data_path", "{tmp}/binary.txt"], "binary.txt: is not a UTF-8 text file"),
    "empty prompt": (["--prompt", " "], "--prompt is empty"),
    "other number of extended prompts": (["--extended_prompt_path", "{tmp}/one.txt"], "one.txt, line 2: holds no"),
    "prompt with i2v": (["--i2v", "--prompt", "a cat"], "--prompt cannot be used with --i2v"),
    "missing image": (["--i2v", "--data_path", "{tmp}/images.jsonl"], "images.jsonl, line 2: image {tmp}/nowhere.png"),
    "prompts for i2v": (["--i2v"], "prompts.txt, line 1: is not"),
    "number for a prompt": (["--i2v", "--data_path", "{tmp}/numbers.jsonl"], "numbers.jsonl, line 1: is not"),
    "non-multiple length": (["--num_output_frames", "7"], "num_frames=7 is not a multiple of frames_per_chunk=3"),
    "non-multiple override": (["video.num_frames=7"], "num_frames=7"),
    "non-multiple i2v": (["--i2v", "--num_output_frames", "9"], "video.num_frames=9"),
    "unknown device": (["--device", "gpu"], "unknown device 'gpu': choose auto, cpu"),
    **{f"nothing for {name}": ([f"--{name}", ""], f"--{name} is empty") for name in FILES},
    "strength of nothing": (["--strength", "0.5"], "--strength has no effect without --v2v"),
    "a folder whose name is no UTF-8": (["--output_folder", "caf\udce9"], "is not text in UTF-8; rename the file"),
    "an empty cache": (["text_encoder.cache="], "text_encoder.cache is empty; give a path, or leave it out"),
    "a second CPU": (["--device", "cpu:9"], "device 'cpu:9' does not exist"),
    "missing device": (["--device", "xpu:99"], "device 'xpu:99' is not available"),
    "bad dtype": (["--dtype", "fp8"], "unknown dtype 'fp8': choose auto, float32, bfloat16, float16"),
    "unwritable folder": (["--output_folder", "{tmp}/a_file"], "cannot write to the folder {tmp}/a_file"),
    "folder below a file": (["--output_folder", "{tmp}/a_file/x"], "cannot write to the folder {tmp}/a_file/x"),
    "override typo": (["rollout.windw=9"], "unknown key rollout.windw=9; did you mean rollout.window?"),
    "override without value": (["rollout.window"], "'rollout.window' is not an override"),
    "wrong type": (["--num_output_frames", "many"], "video.num_frames='many' is not of type int"),
    "wrong type of an override": (["rollout.window=big"], "rollout.window='big' is not of type int | None"),
    "unknown choice": (["codec.kind=tinny"], "codec.kind='tinny' is not one of tiny, wan; did you mean tiny?"),
    "no samples": (["--num_samples", "0"], "inference: num_samples=0 must be at least 1"),
    "no frames a second": (["--fps", "0"], "video: fps=0 must be above 0"),
    "negative length": (["--num_output_frames", "-3"], "num_frames=-3"),
    "window below a chunk": (["rollout.window=2"], "window=2 minus sink=0 is less than frames_per_chunk=3"),
    "height": (["video.height=20"], "video.height=20, video.width=48: must be multiples of 8 and 8"),
    "little memory": (["--vram", "1e-6"], "MB is needed even with text encoder streamed"),
    "no memory": (["--vram", "0"], "vram=0.0 gigabytes must be above 0"),
    "two kinds of long prompts": (["--prompt-extend", "--extended_prompt_path", "x"], "--prompt-extend and --extended"),
    "image for whole clips": (["--i2v", "sampler=many_step"], "--i2v cannot be used with sampler=many_step"),
    "switch without a time": (["--switch", "a cat"], "--switch 'a cat': write a time and a prompt, such as"),
    "switch without a prompt": (["--switch", "1s: "], "--switch '1s: ': write a time and a prompt"),
    "switch at the start": (["--switch", "0s: a cat"], "a switch at 0s would be the first prompt"),
    "late switch": (["--switch", "12s: a cat"], "the prompt at 12s comes after the video's end at 1.75s"),
    "switches out of order": (["--switch", "1s: a", "--switch", "0.5s: b"], "the prompt at 0.5s follows one at 1s"),
    "unknown style": (["--switch", "1s: a", "--switch_style", "fade"], "style='fade' is not one of cut, keep, recache"),
    "style of nothing": (["--switch_style", "cut"], "--switch_style has no effect without --switch"),
    "two storyboards": (["--switch", "1s: a", "--storyboard", "{tmp}/late.yaml"], "--storyboard and --switch both"),
    "missing storyboard": (["--storyboard", "{tmp}/nowhere.yaml"], "{tmp}/nowhere.yaml: cannot read the storyboard"),
    "a storyboard of something else": (["--storyboard", "{tmp}/map.yaml"], "{tmp}/map.yaml: is not a list of"),
    "storyboard out of order": (["--storyboard", "{tmp}/late.yaml"], "the prompt at 1s follows one at 1s"),
    "storyboard without times": (["--storyboard", "{tmp}/time.yaml"], "time.yaml, entry 1: at='soon' is not a time"),
    "storyboard of a new style": (["--storyboard", "{tmp}/style.yaml"], "style.yaml, entry 2: style='fade'"),
    "storyboard and prompt": (["--storyboard", "{tmp}/story.yaml", "--prompt", "b"], "story.yaml: the prompt at 0s"),
    "switch of a teacher": (["--switch", "1s: a", "sampler=many_step"], "prompts cannot change with sampler=many_step"),
    "missing video": (["--extend", "{tmp}/nowhere.mp4"], "cannot read a video from {tmp}/nowhere.mp4"),
    "a video of something else": (["--v2v", "{tmp}/a_file"], "cannot read a video from {tmp}/a_file"),
    "two starts": (["--v2v", "a", "--extend", "b"], "--extend and --v2v each say how a video starts"),
    "no strength": (["--v2v", "a", "--strength", "0"], "--strength 0 must be above 0"),
    "a teacher following": (["--v2v", "a", "sampler=many_step"], "--v2v cannot be used with sampler=many_step"),
    "a teacher extending": (["--extend", "a", "sampler=many_step"], "--extend cannot be used with sampler=many_step"),
    "unknown preset": (["generator.preset=wan"], "generator: preset='wan' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_a_mistake_ends_in_one_line_before_any_weights(refuse, no_weights, tmp_path, arguments, message):
    write_mistakes(tmp_path)
    assert message.format(tmp=tmp_path) in refuse(*(text.format(tmp=tmp_path) for text in arguments))


def test_a_mistake_in_the_configuration_names_the_nearest_key(refuse, no_weights, release, tmp_path):
    (tmp_path / "typo.yaml").write_text(f"defaults: [{release.config_path}]\nrolout: {{window: 9}}\n")
    assert f"{tmp_path / 'typo.yaml'}: unknown key rolout" in (line := refuse(config_path=tmp_path / "typo.yaml"))
    assert "did you mean rollout?" in line
    (tmp_path / "type.yaml").write_text(f"defaults: [{release.config_path}]\nvideo: {{height: tall}}\n")
    assert "video.height='tall' is not of type int" in refuse(config_path=tmp_path / "type.yaml")
    assert "typ.yaml: cannot read the configuration" in (line := refuse(config_path=tmp_path / "typ.yaml"))
    assert "did you mean typ" in line


@pytest.mark.parametrize("key", ["codec.weights", "text_encoder.weights", "text_encoder.tokenizer", "generator.lora"])
def test_a_key_with_a_path_that_is_too_long_is_one_line(refuse, tmp_path, key):
    assert "xxx" in refuse(f"{key}={tmp_path / ('x' * 5000)}")


def test_help_names_what_the_shapes_model_understands_and_each_default():
    words = inference.EPILOG.replace(",", "").split()
    for values in ATTRIBUTES.values():
        assert all(word in words for value in values for word in value.split())
    for action in inference.build_parser()._actions:
        assert action.help
        if action.option_strings and action.dest not in ("help", "prompt"):
            assert "default: " in action.help, action.option_strings


def test_a_full_disk_is_refused(refuse, no_weights, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "3 videos take up to 0.2 MB, and 0.0 MB is free; choose another --output_folder" in refuse()


@pytest.mark.parametrize("profile", [PROFILES[1], PROFILES[-1]], ids=str)
def test_a_limit_chooses_what_fits_says_so_and_makes_the_same_video(make, release, capsys, profile):
    whole = make("--prompt", "a cat", folder="whole")
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "use_ema": False, "text": True}
    needed = need(profile, measured_sizes(release.config(), **options), one_memory=True).device
    capsys.readouterr()
    limited = make("--prompt", "a cat", "text_encoder.cache=null", "--vram", f"{needed / GB:.9f}", folder="limited")
    assert same(whole / "a cat-0.mp4", limited / "a cat-0.mp4")
    assert f"memory: {profile}: " in (said := capsys.readouterr().err)
    assert "of RAM is allowed (--vram); everything resident takes" in said


@pytest.mark.parametrize("sampler", ["many_step", "causal_many_step"])
def test_many_step_samplers_make_videos_of_the_teacher(make, release, sampler):
    teacher = ["--checkpoint_path", str(release.folder / "teacher"), f"sampler={sampler}", "--prompt", "a cat"]
    folder = make(*teacher, "--num_output_frames", "3")
    assert len(read_video(folder / "a cat-0.mp4")) == 9
    settings = records(folder)[0]["settings"]
    assert (settings["sampler"], settings["sampling"]["steps"]) == (sampler, 2)
    unguided = make(*teacher, "--num_output_frames", "3", "sampling.guidance_scale=1", folder="unguided")
    assert not same(folder / "a cat-0.mp4", unguided / "a cat-0.mp4")


def test_the_text_encoder_may_be_gone_once_all_prompts_are_known(make, release, tmp_path, capsys):
    copy = tmp_path / "text_encoder"
    shutil.copytree(release.folder / "text_encoder", copy)
    text = [f"text_encoder.weights={copy}", f"text_encoder.cache={tmp_path / 'cache'}"]
    teacher = ["--checkpoint_path", str(release.folder / "teacher"), "sampler=many_step", "--num_output_frames", "3"]
    first = make(*teacher, *text, "--prompt", "a cat", folder="first")
    shutil.rmtree(copy)
    again = make(*teacher, *text, "--prompt", "a cat", folder="again")
    assert same(first / "a cat-0.mp4", again / "a cat-0.mp4")
    assert inference.main(["--config_path", release.config_path, *text, "--prompt", "a dog"]) == 2
    assert f"error: {copy}: no such file" in capsys.readouterr().err


def test_prompt_extend_generates_from_long_prompts_under_the_short_names(make, monkeypatch, tmp_path):
    asked = []

    def extend(prompts, cache_file):
        asked.append((prompts, cache_file))
        return [f"{prompt}, in bright light" for prompt in prompts]

    monkeypatch.setattr("utils.prompt_extend.extend_prompts", extend)
    folder = make("--prompt-extend", "--prompt", "a cat")
    assert videos(folder) == ["a cat-0.mp4"]
    assert [record["prompt"] for record in records(folder)] == ["a cat, in bright light"]
    assert asked == [(["a cat"], folder / "extended_prompts.jsonl")]


def test_damaged_checkpoints_are_named(refuse, release, tmp_path):
    write_mistakes(tmp_path)
    whole = (release.folder / "generator" / "model.safetensors").read_bytes()
    for name, content in {"cut.safetensors": whole[: len(whole) // 2], "none.safetensors": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}: " in refuse("--checkpoint_path", tmp_path / name)
    assert "junk.pt: is not a PyTorch file" in refuse("--checkpoint_path", tmp_path / "junk.pt")
    torch.save({"generator": {"weight": torch.zeros(1000)}}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:3000])
    assert "cut.pt: truncated or damaged" in refuse("--checkpoint_path", tmp_path / "cut.pt")
    torch.save({"generator": {"weight": torch.zeros(10)}}, tmp_path / "no_ema.pt")
    assert "has no generator_ema" in refuse("--checkpoint_path", tmp_path / "no_ema.pt", "--use_ema")


def test_a_checkpoint_of_another_architecture_names_the_first_tensors(refuse, release, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((release.folder / "generator" / "model.safetensors").read_bytes())
    sizes = json.loads((release.folder / "generator" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"dim": 64}))
    line, channels = refuse("--checkpoint_path", tmp_path), sizes["in_dim"]
    assert f"{tmp_path}: does not fit WanTransformer: patch_embedding.weight " in line
    assert f"(file: (32, {channels}, 1, 2, 2), model: (64, {channels}, 1, 2, 2))" in line


def test_a_real_process_exits_with_2(tmp_path):
    command = [sys.executable, "inference.py", "--config_path", str(tmp_path / "nowhere.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'nowhere.yaml'}: cannot read the configuration: No such file or directory\n"
    )


@pytest.fixture
def make_in_two(release, tmp_path):
    """Give a function that runs inference.py in two processes into a folder, as torchrun does."""

    def make_in_two(name: str, *arguments: str) -> Path:
        folder = tmp_path / name
        group = launch(["--config_path", release.config_path, "--output_folder", str(folder), *arguments], 2,
                       program="inference")  # fmt: skip
        for each in group:
            each.join(240)
        assert [each.exitcode for each in group] == [0, 0], log_file(folder).read_text()
        return folder

    return make_in_two


def test_two_processes_share_the_prompts_and_make_the_same_videos(make, make_in_two, release):
    alone = make("--num_output_frames", "3", folder="alone")
    shared = make_in_two("shared", "--num_output_frames", "3")
    assert videos(shared) == videos(alone)
    assert sorted(record["prompt"] for record in records(shared)) == sorted(release.prompts)
    assert (shared / "contact_sheet.png").is_file()
    for name in videos(alone):
        assert same(shared / name, alone / name)


def test_two_processes_make_one_video_together(make, make_in_two, release):
    """Each process computes a part of the tokens of every frame (Ulysses). The files equal those of one process."""
    frames = ("--num_output_frames", "3", "--prompt", release.prompts[0])
    alone = make(*frames, folder="alone")
    together = make_in_two("together", *frames, "optimize.sequence_parallel=true")
    assert len(records(together)) == 1
    one, two = (read_video(folder / videos(alone)[0]).int() for folder in (alone, together))
    assert one.shape == two.shape and abs(one - two).max() <= 2  # of 255: rounding


def processes_of(job: int) -> dict[int, int]:
    """Return rank -> process id of the children of torchrun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(job):
                rank = (folder / "environ").read_bytes().partition(b"\0RANK=")[2].partition(b"\0")[0]
                found[int(rank)] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks through Linux's /proc")
def test_a_killed_rank_ends_the_job_with_a_message_and_the_finished_videos_stay(make, release, tmp_path):
    """A process under torchrun gets a real SIGKILL in the middle of a video. The next run makes the missing videos."""
    folder, prompts = tmp_path / "videos", ("a cat", "a dog", "a cow", "a pig")
    arguments = [*(word for prompt in prompts for word in ("--prompt", prompt)), "--num_output_frames", "60"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "inference.py"]
    job = subprocess.Popen(
        [*torchrun, "--config_path", release.config_path, "--output_folder", str(folder), *arguments],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        begun = [folder / name for name in ("a cat-0.mp4", "a dog-0.mp4", "a pig-0.partial.mp4")]
        while not all(path.exists() and path.stat().st_size > 5_000 for path in begun):
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.02)
        ranks, killed = processes_of(job.pid), time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        errors = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert time.monotonic() - killed < 30 and job.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in errors
    assert not Path(f"/proc/{ranks[0]}").exists()
    finished = {name: content for name, content in snapshot(folder).items() if "partial" not in name}
    assert {"a cat-0.mp4", "a dog-0.mp4"} <= finished.keys() and "a pig-0.mp4" not in finished
    make(*arguments)
    assert finished.items() <= snapshot(folder).items()
    assert videos(folder) == sorted(f"{prompt}-0.mp4" for prompt in prompts) and len(records(folder)) == 4
