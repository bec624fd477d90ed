"""demo.py refuses mistakes on the command line with one line."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI

import demo
from pipeline.serving import run
from tests.serving.synthetic import SyntheticModel, synthetic_server
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]


@pytest.fixture
def refuse(capsys, monkeypatch, tmp_path):
    """Give a function that runs demo.py with a mistake and returns its one line. It must not serve anything."""

    def serve(*_) -> None:
        raise AssertionError("a mistake must be found before anything is served")

    monkeypatch.setattr(run, "serve", serve)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")

    def refuse(*arguments: str) -> str:
        code = demo.main(["--config_path", "config.yaml", "--port", "0", *arguments])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
        return err

    return refuse


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "::"], ["--share"]])
def test_others_are_let_in_only_on_purpose(refuse, arguments):
    error = refuse(*arguments)
    assert arguments[0] in error and "--auth" in error and "--insecure" in error


@pytest.mark.parametrize("auth", ["", "me", "me:", ":secret"])
def test_a_password_needs_both_parts(refuse, auth):
    assert "user:password" in refuse("--auth", auth)


def test_a_missing_file_is_named(refuse):
    assert "nowhere.yaml" in refuse("--config_path", "nowhere.yaml")
    assert "weights.pt" in refuse("--checkpoint_path", "weights.pt")


def test_several_configurations_can_be_named_before_overrides():
    args = demo.parse_arguments(["--config_path", "a.yaml", "b.yaml", "rollout.window=9", "--batch", "video.fps=8"])
    assert args.config_path == ["a.yaml", "b.yaml"] and args.overrides == ["rollout.window=9", "video.fps=8"]


def test_weights_belong_to_one_configuration(refuse):
    arguments = ("--config_path", "config.yaml", "config.yaml")
    assert "--config_path names 2" in refuse(*arguments, "--checkpoint_path", "config.yaml")
    assert "--config_path names 2" in refuse(*arguments, "generator.weights=other.pt")


@pytest.mark.parametrize(
    ("second", "reason"),
    [("{nonsense: 1}", "nonsense"), ("{generator: {weights: nowhere}}", "nowhere"), (None, "named twice")],
)
def test_a_mistake_in_any_configuration_is_told_before_the_server_starts(
    release, tmp_path, monkeypatch, capsys, second, reason
):
    def start(*_) -> None:
        raise AssertionError("the server starts")

    monkeypatch.setattr(run, "make_runner", start)
    other = tmp_path / "other.yaml"
    other.write_text(second or "{}")
    named = [release.config_path, release.config_path if second is None else str(other)]
    assert demo.main(["--config_path", *named, "--port", "0", "--clips_folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and reason in error


@pytest.mark.parametrize(
    ("arguments", "private"),
    [
        ([], True),
        (["--auth", "me:secret"], True),
        (["--host", "0.0.0.0", "--insecure"], False),
        (["--share", "--insecure"], False),
        (["--trusted-proxy", "127.0.0.1"], False),
        (["--allowed-host", "films.example"], False),
        (["--root-path", "/wan"], False),
    ],
)
def test_a_server_that_others_can_reach_is_not_private(arguments, private):
    assert run.is_private(demo.parse_arguments(arguments)) is private


def test_a_folder_without_a_name_is_refused(refuse):
    assert "the name of the folder to write to is empty" in refuse("--clips_folder", "")


def test_one_key_has_one_value(refuse):
    error = refuse("--checkpoint_path", "config.yaml", "generator.weights=other.pt")
    assert "--checkpoint_path config.yaml and generator.weights=other.pt give one key two values" in error


def test_a_taken_port_is_named(refuse):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refuse("--port", str(port))
    assert f"127.0.0.1:{port}" in error and "--port" in error


@pytest.mark.parametrize("arguments", [["--max-viewers", "0"], ["--longest_clip", "0"], ["--port", "70000"]])
def test_numbers_out_of_range_are_refused(refuse, arguments):
    assert arguments[1] in refuse(*arguments)


def test_a_model_that_does_not_load_ends_the_program_with_its_reason(tmp_path, monkeypatch, capsys):
    """The page is already served then. The program still ends, with one line that names the missing file."""

    class Missing(SyntheticModel):
        def load(self, report) -> None:
            raise UserError("nowhere/model: no such file or folder")

    monkeypatch.setattr(run, "build_server", lambda args, **_: synthetic_server(tmp_path, Missing()))
    monkeypatch.setattr("pipeline.serving.site.gradio_page", lambda root_path: FastAPI())
    with ThreadPoolExecutor() as pool:  # as its event loop needs a thread of its own
        code = pool.submit(demo.main, ["--port", "0", "--clips_folder", str(tmp_path), "--no-browser"]).result(60)
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: nowhere/model: no such file or folder"
