"""Files appear complete or not at all, and any text can become a file name."""

import logging

import pytest

from utils.errors import UserError
from utils.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    ensure_writable_folder,
    exact_stem,
    safe_stem,
    set_aside,
)

PROMPTS = [
    "a large red circle moving up",
    "A large red circle moving up",
    "../../etc/passwd",
    'a/b\\c:d*e?f"g<h>i|j',
    "🎬 a cat 🐈",
    "猫が走る" * 40,
    "x" * 300,
    "x" * 299 + "y",
    "",
    " ",
    ".",
    "..",
    ".hidden",
    "con",
    "NUL",
    "lpt1",
    "line\nbreak\ttab\0nul",
    "--help",
    "a sentence that ends.",
    "café",
    "cafe\u0301",
    "\ud800 lone surrogate",
    "_",
    "untitled",
]


def test_a_file_appears_only_when_writing_succeeds(tmp_path):
    path = tmp_path / "new" / "video.mp4"
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == path.parent
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old ✓")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old ✓"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_makes_a_file_name_that_can_be_written(tmp_path, prompt):
    stem = safe_stem(prompt)
    (tmp_path / f"{stem}.mp4").write_text("x")
    assert (tmp_path / f"{stem}.mp4").parent == tmp_path
    assert len(stem.encode()) <= 80 and stem[0] not in ".- " and not set(stem) & set('./\\:*?"<>|\n\t\0')
    assert stem == safe_stem(prompt)


def test_different_prompts_make_different_names_even_where_case_is_ignored():
    stems = {safe_stem(prompt).casefold() for prompt in PROMPTS}
    assert len(stems) == len(PROMPTS)


def test_plain_prompts_are_their_own_names_and_altered_ones_stay_readable():
    assert safe_stem(PROMPTS[0]) == PROMPTS[0]
    assert safe_stem("A cat.").startswith("A cat-")
    assert safe_stem("con") != "con"
    assert len(safe_stem("x" * 300, max_length=20)) == 20
    with pytest.raises(ValueError, match="max_length=3"):
        safe_stem("abc", max_length=3)


@pytest.mark.parametrize(
    "prompt",
    [
        "A dog, running.",
        'a person\'s "sign" says: STOP?',
        "猫が走る",
        "-5 degrees",
        "cafe\u0301 🐈",
        "x" * 240,
        "con",
        "a.b.c",
    ],
)
def test_a_text_that_can_be_a_name_stays_exactly_as_it_is(tmp_path, prompt):
    assert exact_stem(prompt, 240) == prompt
    (tmp_path / f"{prompt}-0.mp4").write_text("x")


@pytest.mark.parametrize(
    "prompt", ["a/b", "a\0b", "a\nb", "a\x1b[31mb", ".hidden", "..", "", " a", "\ud800", "x" * 241, "é" * 121]
)
def test_a_text_that_cannot_be_a_name_is_cleaned_and_hashed(tmp_path, prompt):
    stem = exact_stem(prompt, 240)
    assert stem == safe_stem(prompt) != prompt and len(stem.encode()) <= 80
    (tmp_path / f"{stem}-0.mp4").write_text("x")


def test_a_folder_is_made_or_refused(tmp_path):
    assert ensure_writable_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write to the folder .*file.*choose another"):
            ensure_writable_folder(path)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_symlink_at_the_name_is_replaced_and_its_target_untouched(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    link = tmp_path / "config.yaml"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert target.read_text() == "precious" and link.read_text() == "new" and not link.is_symlink()


def test_damaged_files_are_set_aside_under_names_of_their_own(tmp_path, caplog):
    for _ in range(2):
        (tmp_path / "latest").write_text("?")
        set_aside(tmp_path / "latest", "is damaged", logging.getLogger("test"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.damaged", "latest.damaged-2"]
    assert len(caplog.records) == 2 and "latest.damaged-2" in caplog.text
