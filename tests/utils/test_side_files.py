"""Side files are read with a size limit and a schema. Damaged lines are set aside and never lost."""

import json
import logging
import os
from dataclasses import dataclass

import pytest

from utils.errors import UserError
from utils.side_files import append_json_line, read_json, read_json_lines


@dataclass
class About:
    steps: int
    name: str = "x"


def test_a_json_file_becomes_the_schema(tmp_path):
    path = tmp_path / "about.json"
    path.write_text(json.dumps({"steps": 3, "unknown": 1}))
    assert read_json(path, About) == About(3)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[1]", "the whole content"),
        (b'{"steps": "many"}', "steps = 'many'"),
        (b'{"steps": NaN}', "NaN"),
        (b'{"name": "y"}', "steps"),
        (b"[" * 5000 + b"]" * 5000, "nested"),
        (b'{"steps": 1, "name": "' + b"a" * 2**20 + b'"}', "at most"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, content, said):
    path = tmp_path / "about.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, About, max_bytes=2**19)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_a_very_long_name_are_one_line(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / ("n" * 5000)):
        with pytest.raises(UserError) as error:
            read_json(path)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("torn", [b'{"steps": 2, "na', b"garbage", b"\x00" * 64, b'{"steps": "x"}'])
def test_torn_lines_are_set_aside_once_with_one_warning(tmp_path, caplog, torn):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"steps": 1}\n' + torn + b"\n" + b'{"steps": 3}\n')
    with caplog.at_level(logging.WARNING):
        assert [record.steps for record in read_json_lines(path, About)] == [1, 3]
        assert [record.steps for record in read_json_lines(path, About)] == [1, 3]
    assert len(caplog.records) == 1
    assert torn in (tmp_path / "records.jsonl.damaged").read_bytes()


def test_a_record_after_a_torn_one_begins_on_a_new_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"steps": 1}\n{"ste')
    append_json_line(path, {"steps": 2})
    assert [record.steps for record in read_json_lines(path, About)] == [1, 2]


def test_nothing_is_appended_through_a_symlink(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    os.symlink(target, tmp_path / "records.jsonl")
    with pytest.raises(UserError, match="link"):
        append_json_line(tmp_path / "records.jsonl", {"steps": 2})
    assert target.read_text() == "precious"
