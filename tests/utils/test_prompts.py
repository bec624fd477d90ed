"""Prompt files: lines are read in order, and an error names the number of the wrong line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.prompts import PromptLine, pair_prompts, read_image_prompts, read_prompt_lines, read_prompts

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


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\t", "\x1b", "\0"])
def test_only_line_ends_end_a_prompt_and_control_characters_become_spaces(tmp_path, separator):
    (tmp_path / "prompts.txt").write_bytes(f"a cat{separator}sleeps\ra dog\r\n\na cow\n".encode())
    lines = read_prompt_lines(tmp_path / "prompts.txt")
    assert lines == [PromptLine(1, "a cat sleeps"), PromptLine(2, "a dog"), PromptLine(4, "a cow")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a cat, asleep", "id": 1}\n\n{"prompt": "a \\n dog"}\n'),
        ("p.JSONL", '\ufeff{"prompt": "a cat, asleep"}\n{"prompt": "a \\n dog"}'),
        ("p.csv", 'id,prompt\n1,"a cat, asleep"\n2,"a \n dog"\n'),
        ("p.csv", "\ufeffPrompt ;x,id\n".replace(" ;x", "") + '"a cat, asleep",1\r\na   dog,2\r\n'),
        ("p.tsv", "prompt\tid\na cat, asleep\t1\na   dog\t2\n"),
    ],
)
def test_the_prompt_column_of_json_lines_and_csv_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a cat, asleep", "a   dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "id,text\n1,a cat\n", r"has no column 'prompt' \(its columns: id, text\)"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"text": "a dog"}\n', r'line 2: is not {"prompt": ...}'),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "a d', "line 2: is not"),
        ("p.jsonl", "[" * 100_000, "line 1: is not"),
        (
            "p.csv",
            "id,prompt\n1,a cat\n2\n3,a dog\n",
            "p.csv, record 2: has no prompt; write one or take the record out",
        ),
        ("p.csv", 'prompt,id\n" ",2\n', "record 1: has no prompt"),
        ("p.csv", 'prompt\n"a cat\na dog\n', "is not CSV .unexpected end of data"),
        ("p.HTML", "<p>a cat</p>", "a .html file cannot be read as prompts"),
        ("p.json", '["a cat"]', "a .json file cannot be read as prompts; give a .txt, .jsonl or .csv file"),
    ],
)
def test_a_file_without_a_prompt_column_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_two_files_are_paired_line_by_line(tmp_path):
    (tmp_path / "long.txt").write_text("long cat\n\nlong dog\n\n\n")
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    names = read_prompt_lines(tmp_path / "names.txt")
    assert pair_prompts(names, "names.txt", tmp_path / "long.txt") == ["long cat", "long dog"]


@pytest.mark.parametrize(
    ("names", "extended", "message"),
    [
        (
            "cat\ndog\n\nbird\n",
            "long cat\n\nlong sky\nlong bird\n",
            "long.txt, line 2: holds no prompt, but .*names.txt, line 2, is 'dog'",
        ),
        ("cat\n", "long cat\nlong dog\n", "names.txt, line 2: holds no prompt, but .*long.txt, line 2, is 'long dog'"),
        ("cat\ndog\n", "long cat\n", "long.txt, line 2: holds no prompt"),
    ],
)
def test_a_line_without_a_counterpart_is_refused_with_both_numbers(tmp_path, names, extended, message):
    (tmp_path / "names.txt").write_text(names)
    (tmp_path / "long.txt").write_text(extended)
    lines = read_prompt_lines(tmp_path / "names.txt")
    with pytest.raises(UserError, match=message):
        pair_prompts(lines, str(tmp_path / "names.txt"), tmp_path / "long.txt")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("vidprom_filtered_extended.txt", "hf download gdhe17/Self-Forcing vidprom_filtered_extended.txt --local-dir"),
        ("MovieGenVideoBench_extended.txt", "curl -L --create-dirs -o"),
    ],
)
def test_a_missing_published_file_comes_with_the_command_that_downloads_it(tmp_path, name, command):
    with pytest.raises(UserError, match=command) as error:
        read_prompts(tmp_path / "prompts" / name)
    assert str(tmp_path / "prompts") in str(error.value).split(command)[1] and "\n" not in str(error.value)


def test_a_path_that_is_too_long_is_one_short_line(tmp_path):
    with pytest.raises(UserError, match="no such prompt file") as error:
        read_prompts(tmp_path / ("x" * 5000))
    assert len(str(error.value)) < 300


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
    """The images are drawn smaller here. Their coarse averages equal those of the shipped images."""
    from scripts import make_first_images
    from scripts.runs import make_first_images as work

    monkeypatch.setattr(work, "WIDTH", 104)
    monkeypatch.setattr(work, "HEIGHT", 60)
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
