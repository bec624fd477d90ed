"""Prompt files: their lines in order, and the line that is wrong by its number in the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.prompts import read_image_prompts, read_prompts

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"


def test_prompts_are_the_non_empty_lines_in_order_without_a_byte_order_mark(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\n  a dog 🐈 \n\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog 🐈"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such"), (b"\n \n", "holds no prompt"), (b"", "holds no"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_file_without_prompts_is_named(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_image_prompts_are_found_relative_to_their_list(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "a.png")
    (tmp_path / "list.jsonl").write_text('\n{"image": "sub/a.png", "prompt": " a cat "}\n')
    monkeypatch.chdir(tmp_path / "sub")
    assert read_image_prompts(tmp_path / "list.jsonl") == ([tmp_path / "sub" / "a.png"], ["a cat"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "nowhere.png", "prompt": "a cat"}', "line 3: image .*nowhere.png not found"),
        ('{"image": "a.png"}', "line 3: is not"),
        ('{"image": "a.png", "prompt": 5}', "line 3: is not"),
        ('{"image": 5, "prompt": "a cat"}', "line 3: is not"),
        ('["a.png", "a cat"]', "line 3: is not"),
        ("a cat", "line 3: is not"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_in_the_file(tmp_path, line, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text(f'{{"image": "a.png", "prompt": "first"}}\n\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_image_prompts(tmp_path / "list.jsonl")


@pytest.mark.parametrize(("name", "size", "count"), [("i2v", (832, 480), 8), ("shapes_i2v", (48, 48), 6)])
def test_the_shipped_first_images_are_small_files_of_the_size_that_is_generated(name, size, count):
    images, prompts = read_image_prompts(PROMPTS / f"{name}.jsonl")
    assert len(set(prompts)) == len(set(images)) == len(images) == count
    assert {image.name for image in images} == {file.name for file in (PROMPTS / name).iterdir()}
    for image in images:
        assert image.stat().st_size <= 60_000
        with Image.open(image) as picture:
            assert picture.size == size
            assert picture.mode == "RGB"


def test_first_images_are_drawn_by_their_script(tmp_path, monkeypatch):
    """Drawn small here: coarse averages are those of the shipped ones."""
    from scripts import make_first_images

    monkeypatch.setattr(make_first_images, "WIDTH", 104)
    monkeypatch.setattr(make_first_images, "HEIGHT", 60)
    assert make_first_images.main(["--output_folder", str(tmp_path)]) == 0
    assert (tmp_path / "shapes_i2v.jsonl").read_bytes() == (PROMPTS / "shapes_i2v.jsonl").read_bytes()
    drawn, shipped = (sorted(folder.rglob("*.[jp][pn]g")) for folder in (tmp_path, PROMPTS))
    assert [path.relative_to(tmp_path) for path in drawn] == [path.relative_to(PROMPTS) for path in shipped]
    for ours, theirs in zip(drawn, shipped, strict=True):
        with Image.open(ours) as small, Image.open(theirs) as large:
            small, large = (
                np.asarray(picture.resize((26, 15), Image.Resampling.BOX), float) for picture in (small, large)
            )
        assert abs(small - large).mean() < 8, ours.name
