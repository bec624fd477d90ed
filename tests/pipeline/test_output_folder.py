"""An output folder: a video is skipped only if its own file says that it is the same one. No file is lost."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.inference.folder import OutputFolder, Placement, settle_partials
from pipeline.inference.plan import Job
from pipeline.inference.recipe import Recipe, read_recipe
from pipeline.inference.records import RECORDS, complete_records
from utils.errors import UserError
from utils.mp4 import is_complete
from utils.video.write import VideoWriter

RECIPE = Recipe(
    name="a cat-0",
    prompt="a long cat, asleep 🐈",
    seed=0,
    sample=0,
    image=None,
    extends=None,
    follows=None,
    strength=None,
    switches=((1.5, "cut", "a dog"),),
    weights={"generator": "a1", "codec": "b2", "text_encoder": "c3"},
    settings={"video": {"fps": 16, "num_frames": 9}, "dtype": "float32"},
)
OTHERS = {
    "prompt": "a cat",
    "sample": 1,
    "image": "0123",
    "extends": "0123",
    "follows": "0123",
    "strength": 0.5,
    "switches": ((1.5, "keep", "a dog"),),
    "weights": RECIPE.weights | {"codec": "other"},
    "settings": RECIPE.settings | {"dtype": "bfloat16"},
}


def place(folder: Path, *recipes: Recipe) -> list[Placement]:
    output = OutputFolder(folder)
    return [output.place(Job("a cat", recipe)) for recipe in recipes]


def write(path: Path, recipe: Recipe = RECIPE, *, frames: int = 4, stop: bool = False) -> Path:
    with VideoWriter(path, 8, metadata=recipe.tags) as writer:
        writer.write(torch.rand(frames, 3, 16, 16) * 2 - 1)
        if stop:
            writer.stop()
    return writer.partial if stop else path


def test_a_recipe_comes_back_from_the_file_and_16_is_16_point_0(tmp_path):
    path = write(tmp_path / "x.mp4")
    assert read_recipe(path) == RECIPE
    whole = replace(RECIPE, settings={"video": {"fps": 16.0, "num_frames": 9}, "dtype": "float32"})
    assert whole.text == RECIPE.text
    assert read_recipe(tmp_path / "nowhere.mp4") is None


def test_a_whole_file_of_the_same_recipe_exists_wherever_its_name_led(tmp_path):
    assert place(tmp_path, RECIPE) == [Placement(Job("a cat", RECIPE), tmp_path / "a cat-0.mp4", False)]
    write(tmp_path / f"a cat-0-{RECIPE.digest}.mp4")
    (placement,) = place(tmp_path, RECIPE)
    assert placement.exists and placement.path.name == f"a cat-0-{RECIPE.digest}.mp4"


@pytest.mark.parametrize("field", OTHERS)
def test_another_recipe_gets_a_name_of_its_own(tmp_path, field):
    kept = write(tmp_path / "a cat-0.mp4").read_bytes()
    other = replace(RECIPE, **{field: OTHERS[field]})
    (placement,) = place(tmp_path, other)
    assert not placement.exists and placement.path.name == f"a cat-0-{other.digest}.mp4"
    assert (tmp_path / "a cat-0.mp4").read_bytes() == kept


def test_another_seed_alone_is_named_by_the_seed(tmp_path):
    write(tmp_path / "a cat-0.mp4")
    seeded = replace(RECIPE, seed=7)
    assert place(tmp_path, seeded)[0].path.name == "a cat-0-seed7.mp4"
    write(tmp_path / "a cat-0-seed7.mp4", seeded)
    (tmp_path / "a cat-0.mp4").unlink()
    assert place(tmp_path, seeded)[0] == Placement(Job("a cat", seeded), tmp_path / "a cat-0-seed7.mp4", True)


def test_names_that_differ_by_case_alone_do_not_meet(tmp_path):
    upper, lower, composed = (
        replace(RECIPE, name=name) for name in ("A Cat\u00e9-0", "a cat\u00e9-0", "a cate\u0301-0")
    )
    names = [placement.path.name for placement in place(tmp_path, upper, lower, composed)]
    assert names == ["A Cat\u00e9-0.mp4", f"a cat\u00e9-0-{lower.digest}.mp4", f"a cate\u0301-0-{composed.digest}.mp4"]
    write(tmp_path / "A CATE\u0301-0.mp4", upper)
    assert place(tmp_path, lower)[0].path.name == f"a cat\u00e9-0-{lower.digest}.mp4"


def leave_empty(path: Path) -> None:
    path.touch()


def leave_truncated(path: Path) -> None:
    content = write(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def leave_last_byte_off(path: Path) -> None:
    path.write_bytes(write(path).read_bytes()[:-1])


def leave_text(path: Path) -> None:
    path.write_text("not a video")


@pytest.mark.parametrize("leave", [leave_empty, leave_truncated, leave_last_byte_off, leave_text])
def test_a_damaged_file_is_set_aside_and_the_name_is_used_again(tmp_path, leave, caplog):
    path = tmp_path / "a cat-0.mp4"
    leave(path)
    content = path.read_bytes()
    assert not is_complete(path)
    assert place(tmp_path, RECIPE) == [Placement(Job("a cat", RECIPE), path, False)]
    assert not path.exists() and (tmp_path / "a cat-0.mp4.damaged").read_bytes() == content
    assert len(caplog.records) == 1


def leave_folder(path: Path) -> None:
    path.mkdir()


def leave_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def leave_other_video(path: Path) -> None:
    with VideoWriter(path, 8) as writer:
        writer.write(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("leave", [leave_folder, leave_dangling_link, leave_other_video])
def test_what_a_person_put_there_stays(tmp_path, leave):
    leave(tmp_path / "a cat-0.mp4")
    (placement,) = place(tmp_path, RECIPE)
    assert placement.path.name == f"a cat-0-{RECIPE.digest}.mp4"
    assert os.listdir(tmp_path) == ["a cat-0.mp4"]


def test_a_video_that_was_moved_and_linked_counts(tmp_path):
    (tmp_path / "videos").mkdir()
    write(tmp_path / "elsewhere.mp4")
    (tmp_path / "videos" / "a cat-0.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    assert place(tmp_path / "videos", RECIPE)[0].exists


def test_a_name_whose_unfinished_video_is_another_is_left_to_it(tmp_path):
    write(tmp_path / "a cat-0.mp4", replace(RECIPE, seed=1), stop=True)
    assert place(tmp_path, RECIPE)[0].path.name == f"a cat-0-{RECIPE.digest}.mp4"
    assert place(tmp_path, replace(RECIPE, seed=1))[0].path.name == "a cat-0.mp4"


def test_unfinished_files_go_once_the_video_is_whole_and_else_the_longest_stays(tmp_path):
    path = tmp_path / "a cat-0.mp4"
    short, long = (write(path, frames=frames, stop=True) for frames in (2, 30))
    other = write(path, replace(RECIPE, seed=1), stop=True)
    content = long.read_bytes()
    assert settle_partials(path, RECIPE, finished=False) == short
    assert short.read_bytes() == content and not long.exists() and other.exists()
    assert settle_partials(path, RECIPE, finished=True) is None
    assert list(tmp_path.iterdir()) == [other]


def test_long_names_leave_room_for_what_is_added(tmp_path):
    recipe = replace(RECIPE, name="x" * 249 + "-0")
    path = place(tmp_path, recipe)[0].path
    assert path.name == f"{recipe.name}.mp4"
    partial = write(path, recipe, stop=True)
    write(path, recipe)
    settle_partials(path, recipe, finished=True)
    assert not partial.exists() and place(tmp_path, recipe)[0].exists
    other = place(tmp_path, replace(recipe, prompt="another"))[0].path
    assert len(other.name) == 255 and not other.exists()
    path.write_bytes(b"")
    assert place(tmp_path, recipe)[0].path == path


def test_lost_records_are_found_in_the_files_and_torn_lines_are_set_aside(tmp_path, caplog):
    write(tmp_path / "a cat-0.mp4")
    write(tmp_path / "a dog-0.mp4", replace(RECIPE, name="a dog-0", prompt="a dog"))
    write(tmp_path / "unfinished.mp4", stop=True)
    write(tmp_path / ".temporary.mp4")
    leave_truncated(tmp_path / "cut.mp4")
    leave_other_video(tmp_path / "other.mp4")
    known = {"file": "a dog-0.mp4", "prompt": "a dog", "seconds": 3.5}
    listing = tmp_path / RECORDS
    listing.write_text(json.dumps({**known, "seconds": 1}) + "\n" + json.dumps(known) + '\n{"file": "x.mp4", "promt')
    complete_records(tmp_path)
    dog, cat = (json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines())
    assert dog == known
    assert (cat["file"], cat["prompt"], cat["seed"], cat["frames"]) == ("a cat-0.mp4", RECIPE.prompt, 0, 4)
    assert cat["switches"] == [{"at": 1.5, "prompt": "a dog", "style": "cut"}]
    assert cat["settings"] == RECIPE.settings
    assert (tmp_path / "videos.jsonl.damaged").read_text() == '{"file": "x.mp4", "promt\n'
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    before = listing.stat().st_mtime_ns
    complete_records(tmp_path)
    assert listing.stat().st_mtime_ns == before


def test_a_listing_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "other").write_text("kept\n")
    (tmp_path / RECORDS).symlink_to("other")
    with pytest.raises(UserError, match=r"videos.jsonl: is a link"):
        complete_records(tmp_path)
    assert (tmp_path / "other").read_text() == "kept\n"
