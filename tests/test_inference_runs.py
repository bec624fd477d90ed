"""Several runs of inference.py into one folder: stopped, repeated, at the same time, or with damaged files."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
from scripts import repeat
from tests.inference_parts import REPOSITORY, end, records, same, snapshot, start, videos, wait_for
from utils.video.read import read_video

pytest_plugins = ["tests.shapes_parts", "tests.inference_parts"]

SHORT = ("--num_output_frames", "3")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--seed", "7"), "a cat-0-seed7.mp4"),
        (("--num_output_frames", "6"), None),
        (("rollout.denoising_steps=[1000]",), None),
        (("--checkpoint_path", "{release}/student"), None),
        (("codec.weights={release}/codec2",), None),
        (("--fps", "23.976"), None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_other_settings_make_another_video_and_keep_the_first(make, release, arguments, name):
    if not (release.folder / "codec2").exists():
        change_codec(release.folder)
    arguments = [argument.format(release=release.folder) for argument in arguments]
    folder = make("--prompt", "a cat", *SHORT)
    kept = snapshot(folder)
    config = (folder / "config.yaml").read_text()
    make("--prompt", "a cat", *SHORT, *arguments)
    both = snapshot(folder)
    assert kept.items() <= both.items() and len(both) == 2
    (new,) = both.keys() - kept.keys()
    assert name is None or new == name
    assert len(records(folder)) == 2
    assert config in {path.read_text() for path in folder.glob("config*.yaml")}
    make("--prompt", "a cat", *SHORT, *arguments)
    make("--prompt", "a cat", *SHORT)
    assert snapshot(folder) == both
    assert (folder / "config.yaml").read_text() == config


def change_codec(folder: Path) -> None:
    """Replace the codec by one that decodes other colours."""
    from model.tiny_vae import TinyVAE

    codec = TinyVAE.from_pretrained(folder / "codec")
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.mul_(0.9)
    codec.save_pretrained(folder / "codec2")


def test_another_strength_or_another_content_of_a_file_makes_another_video(make, tmp_path):
    source = make("--prompt", "a red circle", *SHORT, folder="source") / "a red circle-0.mp4"
    for strength in ("0.5", "0.75", "0.5"):
        folder = make("--prompt", "a cat", "--v2v", str(source), "--strength", strength)
    assert len(videos(folder)) == 2
    changed = make("--prompt", "a blue square", *SHORT, folder="changed") / "a blue square-0.mp4"
    source.write_bytes(changed.read_bytes())
    make("--prompt", "a cat", "--v2v", str(source), "--strength", "0.5")
    assert len(videos(folder)) == 3


def test_another_image_of_the_same_name_makes_another_video(make, tmp_path):
    (tmp_path / "images.jsonl").write_text('{"image": "first.png", "prompt": "a cat"}\n')
    for colour in ("red", "blue", "blue"):
        Image.new("RGB", (48, 48), colour).save(tmp_path / "first.png")
        folder = make("--i2v", "--data_path", str(tmp_path / "images.jsonl"), "--num_output_frames", "4")
    assert len(videos(folder)) == 2


def test_the_contact_sheet_shows_the_run_it_belongs_to(make):
    folder = make("--prompt", "a red circle", "--prompt", "a blue square", *SHORT)
    both = (folder / "contact_sheet.png").read_bytes()
    make("--prompt", "a red circle", *SHORT)
    one = Image.open(folder / "contact_sheet.png").height
    make("--prompt", "a red circle", "--prompt", "a blue square", *SHORT)
    assert (folder / "contact_sheet.png").read_bytes() == both
    assert one < Image.open(folder / "contact_sheet.png").height


def test_overwrite_replaces_the_same_video_only(make):
    folder = make("--prompt", "a cat", *SHORT)
    first = snapshot(folder)
    make("--prompt", "a cat", *SHORT, "--seed", "7", "--overwrite")
    assert snapshot(folder)["a cat-0.mp4"] == first["a cat-0.mp4"]
    make("--prompt", "a cat", *SHORT, "--overwrite")
    again = snapshot(folder)
    assert videos(folder) == ["a cat-0-seed7.mp4", "a cat-0.mp4"]
    assert again["a cat-0.mp4"][0] == first["a cat-0.mp4"][0] and again["a cat-0.mp4"] != first["a cat-0.mp4"]
    assert len(records(folder)) == 2


def test_a_stopped_video_is_made_whole_by_the_next_run(make, release, tmp_path):
    length = ("--prompt", "a cat", "--num_output_frames", "120")
    folder = tmp_path / "videos"
    part = folder / "a cat-0.partial.mp4"
    process = start(release, folder, *length)
    wait_for(process, folder, lambda: part.exists() and part.stat().st_size > 5_000)
    os.kill(process.pid, signal.SIGINT)
    code, errors = end(process, folder)
    assert code == 128 + signal.SIGINT and "Traceback" not in errors
    stopped = read_video(part)
    assert 12 < len(stopped) < 477 and not (folder / "a cat-0.mp4").exists()
    make("--prompt", "a cat", *SHORT)  # another video: the unfinished one keeps its name
    assert part.exists() and len(videos(folder)) == 2
    make(*length)
    assert not part.exists()
    whole = read_video(folder / "a cat-0.mp4")
    assert len(whole) == 477 and torch.equal(stopped[:-12], whole[: len(stopped) - 12])


def test_a_second_run_into_a_folder_is_refused_in_one_line_while_the_first_runs(make, release, tmp_path, capsys):
    folder = tmp_path / "videos"
    process = start(release, folder, "--prompt", "a cat", "--num_output_frames", "30000")
    wait_for(process, folder, (folder / "a cat-0.partial.mp4").exists)
    command = ["--config_path", release.config_path, "--output_folder", str(folder), "--prompt", "a dog"]
    try:
        assert inference.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{folder} is in use by inference.py (process {process.pid} " in error
    finally:
        process.kill()
        process.join()
    make("--prompt", "a dog", *SHORT)  # a crash releases the lock
    assert "a dog-0.mp4" in videos(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into the process through Linux's /proc")
def test_ctrl_c_while_the_program_starts_is_one_line(release, tmp_path):
    command = [sys.executable, "inference.py", "--config_path", release.config_path]
    process = subprocess.Popen(
        [*command, "--output_folder", str(tmp_path / "videos")], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(("stopped by Ctrl-C", "ended by", "stopped after")) or not errors


def test_leftovers_of_every_kind_do_not_stop_a_run(make):
    prompts = ["empty", "cut", "folder", "torn"]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    folder = make(*arguments, *SHORT)
    first = snapshot(folder)
    (folder / "empty-0.mp4").write_bytes(b"")
    (folder / "cut-0.mp4").write_bytes(first["cut-0.mp4"][0][:1000])
    (folder / "folder-0.mp4").unlink()
    (folder / "folder-0.mp4").mkdir()
    (folder / "torn-0.partial.mp4").write_bytes(b"\0" * 100)
    with open(folder / "videos.jsonl", "a") as listing:
        listing.write('{"file": "x.mp4", "prom')
    make(*arguments, *SHORT)
    for name in ("empty-0.mp4", "cut-0.mp4", "torn-0.mp4"):
        assert (folder / name).read_bytes() == first[name][0]
    assert len([name for name in videos(folder) if name.startswith("folder-0-")]) == 1
    assert (folder / "empty-0.mp4.damaged").exists() and (folder / "cut-0.mp4.damaged").exists()
    assert (folder / "videos.jsonl.damaged").read_text() == '{"file": "x.mp4", "prom\n'
    assert len(records(folder)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_is_full_keeps_what_plays_and_ends_in_one_line(release, tmp_path):
    import resource

    folder = tmp_path / "videos"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100 * 1024, 100 * 1024))
    process = start(release, folder, "--prompt", "a cat", "--num_output_frames", "30000", prepare=full)
    code, errors = end(process, folder, 120)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert line.startswith("error: cannot write ") and "a cat-0.partial.mp4" in line
    assert len(read_video(folder / "a cat-0.partial.mp4")) > 12


def test_nothing_is_written_through_links(make, release, tmp_path, capsys):
    (tmp_path / "other").write_text("kept")
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a cat-0.partial.mp4", "a cat-0.mp4", "contact_sheet.png", "config.yaml", "extended_prompts.jsonl"):
        (folder / name).symlink_to(tmp_path / "other")
    make("--prompt", "a cat", *SHORT)
    assert (tmp_path / "other").read_text() == "kept"
    for name in ("videos.jsonl", ".lock"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "other")
        command = ["--config_path", release.config_path, "--output_folder", str(folder), "--prompt", "a dog"]
        assert inference.main(command) == 2
        assert f"{name}: is a link" in capsys.readouterr().err
        (folder / name).unlink()
    assert (tmp_path / "other").read_text() == "kept"


def test_a_drawn_seed_is_recorded_and_makes_the_same_video_again(make):
    folder = make("--prompt", "a cat", *SHORT, "--seed", "-1")
    make("--prompt", "a cat", *SHORT, "--seed", "-1")
    seeds = [record["seed"] for record in records(folder)]
    assert len(set(seeds)) == 2 and min(seeds) >= 0
    again = make("--prompt", "a cat", *SHORT, "--seed", str(seeds[0]), folder="again")
    assert same(folder / records(folder)[0]["file"], again / "a cat-0.mp4")


def test_names_are_what_vbench_expects(make):
    prompts = ["A dog, running.", "a person's sign: STOP?", "a cat", "A Cat"]
    folder = make(*(word for prompt in prompts for word in ("--prompt", prompt)), *SHORT, "--num_samples", "2")
    exact = {f"{prompt}-{sample}.mp4" for prompt in prompts[:3] for sample in (0, 1)}
    assert exact < set(videos(folder)) and len(videos(folder)) == 8
    assert all(name.startswith("A Cat-") for name in set(videos(folder)) - exact)


def test_a_rate_that_is_no_whole_number_reaches_the_file(make):
    import av

    folder = make("--prompt", "a cat", *SHORT, "--fps", "23.976")
    with av.open(str(folder / "a cat-0.mp4")) as container:
        assert (
            container.streams.video[0].average_rate == 24000 / 1001
            or str(container.streams.video[0].average_rate) == "24000/1001"
        )


@pytest.mark.parametrize("name", ["${video.height} ${nothing", "~", "null", "#1", "1e3", "a: b", "%s", "[x]", "a=b"])
def test_a_folder_name_is_taken_as_it_stands(release, tmp_path, monkeypatch, name):
    made = []
    monkeypatch.setattr("pipeline.inference.run.run", lambda config, _: made.append(config.inference.output_folder))
    assert inference.main(["--config_path", release.config_path, "--output_folder", name]) == 0
    assert made == [name]


def test_a_video_is_made_in_a_folder_with_an_odd_name(make):
    folder = make("--prompt", "a cat", *SHORT, folder="${video.height} ${nothing")
    assert videos(folder) == ["a cat-0.mp4"]


def test_the_column_of_a_csv_and_the_prompt_of_a_storyboard_without_a_beginning(make, tmp_path):
    (tmp_path / "prompts.csv").write_text('id,prompt\n1,"a cat, asleep"\n')
    assert videos(make("--data_path", str(tmp_path / "prompts.csv"), *SHORT)) == ["a cat, asleep-0.mp4"]
    (tmp_path / "story.yaml").write_text("- {at: 0.4s, prompt: a dog}\n")
    story = make("--storyboard", str(tmp_path / "story.yaml"), "--prompt", "a cow", *SHORT, folder="story")
    (record,) = records(story)
    assert record["prompt"] == "a cow" and record["switches"][0]["prompt"] == "a dog"


def test_words_the_model_does_not_know_and_long_prompts_are_one_warning_each(make, capsys):
    long = " ".join(["a red circle"] * 8)
    make("--prompt", "a purple cat, asleep", "--prompt", "a cat", "--prompt", long, *SHORT)
    cut, unknown, form = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "the model does not know: cat, asleep; it knows: a, and, background, black, blue," in unknown
    assert f"the prompt '{long[:57]}...' has 25 tokens; the model reads the first 16" in cut
    assert (
        "1 of the prompts, such as 'a red circle a red circle" in form and "write it like 'a small red circle" in form
    )


def test_a_prompt_of_known_words_in_an_unknown_form_is_one_warning(make, capsys):
    known = "a large red circle moving up and right on a navy background"
    make("--prompt", "circle red", "--prompt", f"  {known.upper()}", "--prompt", "a red circle", *SHORT)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "2 of the prompts, such as 'circle red', do not have the form that the Shapes model knows" in line


def test_the_records_of_a_listing_that_was_lost_come_back(make):
    folder = make("--prompt", "a cat", "--prompt", "a dog", *SHORT)
    before = records(folder)
    (folder / "videos.jsonl").unlink()
    make("--prompt", "a cat", *SHORT)
    after = {record["file"]: record for record in records(folder)}
    for record in before:
        found = after[record["file"]]
        assert all(found[key] == record[key] for key in ("prompt", "seed", "sample", "frames", "weights", "switches"))
        assert found["settings"]["rollout"] == record["settings"]["rollout"]
    assert os.listdir(folder).count("videos.jsonl") == 1


def test_a_file_depends_on_prompt_seed_and_settings_alone(release, capsys):
    """This test makes three runs beside a busy loop. `python scripts/repeat.py --runs 100 --busy 2` makes more."""
    options = ["--config_path", release.config_path, "--prompt", "a cat", *SHORT]
    assert repeat.main(["--runs", "3", "--busy", "1", *options]) == 0
    assert "run 3 of 3: at most 1 different files" in capsys.readouterr().out


def test_busy_loops_end_with_what_they_run_beside():
    with repeat.busy_cores(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert None not in [loop.poll() for loop in loops]
