"""Clip folders: links are neither served nor followed, old clips count, and a full disk ends only the clip."""

import errno
import os
import subprocess
import unicodedata

import pytest

from pipeline.serving.clips import Gallery, quoted
from pipeline.serving.messages import checked_prompt
from pipeline.serving.spec import StreamSpec
from tests.serving.synthetic import CHUNK_FRAMES, SyntheticModel

HOSTILE = [
    "a\nrm -rf x",
    "\x1b[201~; id\r",
    "a\x00b\x7f\x9b31m",
    "\u202eevil\u2066",
    "a\u2028b\u2029c",
    "it's \\ $(id) `id` \t!",
]


def stem(number: int) -> str:
    return f"a clip-{number:024x}"


def test_clips_of_earlier_runs_count_and_other_files_are_left_alone(tmp_path):
    for number in range(6):
        for suffix in (".mp4", ".gif", ".yaml"):
            path = tmp_path / f"{stem(number)}{suffix}"
            path.write_bytes(b"x")
            os.utime(path, (number, number))
    others = [tmp_path / name for name in ("holiday.mp4", "a-0123.mp4", ".lock", "b.yaml")]
    for path in others:
        path.write_bytes(b"mine")
    target = tmp_path / "precious.txt"
    target.write_bytes(b"mine")
    link = tmp_path / f"{stem(99)}.mp4"
    link.symlink_to(target)
    gallery = Gallery(tmp_path, SyntheticModel.command, most=4)
    from tests.security.test_shares import add_clip

    add_clip(gallery, "me", 1000)
    left = sorted(path.name for path in tmp_path.glob("a clip-*.mp4") if not path.is_symlink())
    assert left == [f"{stem(number)}.mp4" for number in (3, 4, 5)]
    assert not list(tmp_path.glob(f"{stem(0)}*"))
    assert all(path.read_bytes() == b"mine" for path in [*others, target, link])


def test_a_link_in_place_of_a_clip_is_not_served(serve, tmp_path):
    site = serve()
    with site.client() as client:
        client.send("start", prompt="numbers", num_frames=3, fps=60)
        name = client.wait_for("clip")["clip"]["name"] if watch(client) else ""
    (path,) = tmp_path.glob(f"*{name}.mp4")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for kind in ("mp4", "gif"):
        file = path.with_suffix(f".{kind}")
        file.unlink(missing_ok=True)
        file.symlink_to(secret)
        answer = site.http.get(f"/api/v1/clips/{name}.{kind}")
        assert answer.status_code in (404, 503) and "secret" not in answer.text
    site.server.gallery.remove(site.server.gallery.get(name))
    assert secret.read_text() == "secret" and not path.is_symlink()


def watch(client, frames: int = CHUNK_FRAMES) -> bool:
    for _ in range(frames):
        client.frame()
    return True


def test_only_its_session_deletes_a_clip(serve, tmp_path):
    site = serve()
    with site.client() as client, site.client() as other:
        client.send("start", prompt="numbers", num_frames=3, fps=60)
        watch(client)
        name = client.wait_for("clip")["clip"]["name"]
        assert site.http.delete(f"/api/v1/sessions/{other.session}/clips/{name}").status_code == 404
        assert list(tmp_path.glob(f"*{name}*"))
        assert site.http.delete(f"/api/v1/sessions/{client.session}/clips/{name}").status_code == 204
        assert not list(tmp_path.glob(f"*{name}*"))


def make_clip(site) -> tuple[str, str]:
    """Make a clip. Return the session and the name of the clip."""
    with site.client() as client:
        client.send("start", prompt="numbers", num_frames=3, fps=60)
        watch(client)
        return client.session, client.wait_for("clip")["clip"]["name"]


def greeting(site, session: str) -> dict:
    with site.client(session) as client:
        return next(message for message in client.seen if message["type"] == "hello")


def test_after_a_new_start_only_its_browser_finds_a_clip(serve, tmp_path):
    session, name = make_clip(serve())
    assert all(session not in path.read_text() for path in tmp_path.glob("*.json"))
    site = serve()
    assert greeting(site, "mine")["clips"] == []
    assert site.http.get(f"/api/v1/clips/{name}.mp4").status_code == 404
    again = greeting(site, session)
    assert again["session"] == session and [clip["name"] for clip in again["clips"]] == [name]
    assert site.http.get(f"/api/v1/clips/{name}.mp4").content[4:8] == b"ftyp"
    assert [clip["name"] for clip in greeting(serve(), session)["clips"]] == [name]
    assert site.http.delete(f"/api/v1/sessions/{session}/clips/{name}").status_code == 204
    assert not list(tmp_path.glob(f"*{name}*"))


@pytest.mark.parametrize("damage", ["", "[1]", "{}", "link", "another name", "no video"])
def test_a_damaged_record_of_a_clip_shows_nothing_and_stops_nothing(serve, tmp_path, damage):
    session, name = make_clip(serve())
    (record,) = tmp_path.glob("*.clip.json")
    text = record.read_text()
    if damage == "link":
        record.rename(tmp_path / "elsewhere")
        record.symlink_to(tmp_path / "elsewhere")
    elif damage == "no video":
        next(tmp_path.glob("*.mp4")).unlink()
    else:
        record.write_text(text.replace(name, "0" * len(name)) if damage == "another name" else damage)
    site = serve()
    assert greeting(site, session)["clips"] == []
    assert make_clip(site)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("when", ["first", "second", "end"])
def test_a_clip_that_cannot_be_written_ends_alone(serve, monkeypatch, tmp_path, number, when):
    """The viewer gets one message, and the live video goes on."""
    from utils.video.write import VideoWriter

    calls = []
    write, leave = VideoWriter.write, VideoWriter.__exit__

    def failing(self, frames):
        calls.append(1)
        if len(calls) >= (1 if when == "first" else 2):
            raise OSError(number, os.strerror(number))
        write(self, frames)

    def failing_exit(self, kind, error, traceback):
        leave(self, OSError, OSError(), None)
        raise OSError(number, os.strerror(number))

    if when == "end":
        monkeypatch.setattr(VideoWriter, "__exit__", failing_exit)
    else:
        monkeypatch.setattr(VideoWriter, "write", failing)
    with serve().client() as client:
        client.send("start", prompt="numbers", fps=60)
        watch(client, 6 * CHUNK_FRAMES)
        if when == "end":
            client.send("stop")
            client.wait_for("notice")
        (notice,) = [message["message"] for message in client.seen if message["type"] == "notice"]
        assert "not saved" in notice and str(tmp_path) not in notice


@pytest.mark.parametrize("text", HOSTILE)
def test_a_copied_command_holds_no_control_character_and_says_the_same(text):
    said = quoted(text)
    assert not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in said)
    assert "\u202e" not in said and "\u2066" not in said
    if "\x00" not in text:  # no argument can hold one
        printed = subprocess.run(["bash", "-c", f"printf %s {said}"], capture_output=True, check=True).stdout
        assert printed.decode() == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_prompt_is_one_line_of_text(text):
    line = checked_prompt(text)
    assert line.isprintable() or not any(ord(character) < 32 for character in line)
    assert "\n" not in line and line == line.strip()


def test_ordinary_prompts_stay_as_they_are():
    for text in ("a cat, running", "ein Hund – schön", "一只猫", "👩‍🚀 walks", "می‌خواهم", "a  b"):
        assert checked_prompt(text) == " ".join(text.split())


def test_a_command_line_is_safe_as_a_whole(tmp_path):
    gallery = Gallery(tmp_path, SyntheticModel.command)
    line = gallery.command_line(StreamSpec("a\nb", 1, 1, 1), [], 1, tmp_path / "x.mp4")
    assert line == "make $'a\\x0ab'"
