"""Prompt files: their lines in order, and the line that is wrong by its number in the file."""

import pytest
from PIL import Image

from utils.errors import UserError
from utils.prompts import read_image_prompts, read_prompts


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
