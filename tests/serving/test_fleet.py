"""A fleet sends visitors to their own replica and detects a hanging one. test_fleet_of_replicas.py tests Ray itself."""

import importlib
import re
import shlex
import threading
import time
from pathlib import Path

import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pipeline.serving.busy_times import BusyTimes
from pipeline.serving.clips import Gallery
from pipeline.serving.fleet import GREETING, REPLICA_COOKIE, SmallMessages, Sticky, claimed_folder, replica_of
from pipeline.serving.guard import Access, Guard
from pipeline.serving.hub import Hub
from pipeline.serving.limits import Limits
from pipeline.serving.spec import StreamSpec
from scripts import serve_fleet
from scripts.runs.serve_fleet import check_room
from tests.serving.synthetic import SyntheticModel, synthetic_server
from utils.errors import UserError


def page(replica: str, access: Access) -> TestClient:
    """Return a client of a replica without a model."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse(replica))])
    return TestClient(Sticky(Guard(app, access, Limits()), replica, access.root_path))


def test_a_browser_is_told_its_replica_once():
    client = page("abc", Access(None))
    assert f"{REPLICA_COOKIE}=abc; Path=/; HttpOnly" in client.get("/").headers["set-cookie"]
    assert "set-cookie" not in client.get("/").headers
    assert (
        "abc" in page("abc", Access(None)).get("/", headers={"cookie": f"{REPLICA_COOKIE}=gone"}).headers["set-cookie"]
    )


def test_a_large_message_closes_the_line():
    async def echo(scope, receive, send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message.get("text")})

    with TestClient(SmallMessages(echo, 10)).websocket_connect("/") as socket:
        socket.send_text("x" * 10)
        assert socket.receive_text() == "x" * 10
        socket.send_text("x" * 11)
        assert socket.receive()["code"] == 1009


@pytest.mark.parametrize("cookie", ["", "a=b", "\x00;;=", f"{REPLICA_COOKIE}"])
def test_no_replica_is_read_from_other_cookies(cookie):
    assert replica_of(cookie) is None


def test_whoever_signed_in_at_one_replica_is_known_to_the_others():
    access = Access(None, accounts=("me:secret",), cookie_key=b"of the fleet")
    first, second = page("first", access), page("second", access)
    cookies = first.get("/", auth=("me", "secret")).cookies
    second.cookies.update(cookies)
    assert second.get("/").text == "second"
    other = page("third", Access(None, accounts=("me:changed",), cookie_key=b"of the fleet"))
    other.cookies.update(cookies)
    assert other.get("/").status_code == 401


def test_each_replica_of_a_machine_has_a_folder_that_the_next_one_takes_over(tmp_path):
    with claimed_folder(tmp_path) as first, claimed_folder(tmp_path) as second:
        assert first != second
    with claimed_folder(tmp_path) as again:
        assert again == first


def test_busy_times_name_the_thread_that_is_busy_for_longest():
    now = 0.0
    busy = BusyTimes(clock=lambda: now)
    assert busy.longest() == ("", 0.0)
    with busy.at_work("generate"):
        now = 3.0
        with busy.at_work("decode"):
            now = 5.0
            assert busy.longest() == ("generate", 5.0)
    assert busy.longest() == ("", 0.0)


def test_a_hub_whose_generator_hangs_says_so_and_one_that_waits_does_not(tmp_path):
    release = threading.Event()

    def open_session(spec: StreamSpec):
        release.wait()
        return SyntheticModel().open(spec)

    hub = Hub(1, Gallery(tmp_path, SyntheticModel.command))
    hub.ready(open_session)
    assert hub.stalled(0.0) is None
    viewer = hub.submit(StreamSpec("numbers", 48, 48, fps=24), lambda message: None, "me", "session")
    deadline = time.monotonic() + 10
    while hub.stalled(0.05) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "'generate'" in hub.stalled(0.05) and hub.stalled(60.0) is None
    release.set()
    viewer.stop()
    hub.close()
    assert hub.stalled(0.0) is None


@pytest.mark.parametrize(("session", "told"), [("of another server", [GREETING]), (None, [])])
def test_a_client_of_another_server_reads_what_became_of_its_video(serve, session, told):
    with serve(greeting=GREETING).client(session=session) as client:
        client.wait_for("status")
    assert client.session != session
    assert [message["message"] for message in client.seen if message["type"] == "notice"] == told


def test_a_model_that_is_there_is_not_loaded_again(tmp_path):
    loaded = []

    class Counting(SyntheticModel):
        def load(self, report) -> None:
            loaded.append(report)

    server = synthetic_server(tmp_path, Counting())
    server.load()
    server.report("opening the page", 0.02)
    server.load()
    server.close()
    assert len(loaded) == 1 and (server.stage, server.progress) == ("ready", 1.0)


@pytest.mark.parametrize(
    "arguments", [["--replicas", "0"], ["--gpus", "-1"], ["--hang-seconds", "nan"], ["--host", "0.0.0.0"]]
)
def test_mistakes_are_one_line_before_ray_starts(arguments, capsys):
    assert serve_fleet.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and arguments[0] in error


def test_more_replicas_than_there_is_room_for_are_refused():
    args = serve_fleet.make_parser().parse_intermixed_args(["--replicas", "3"])
    with pytest.raises(UserError, match=r"need 3 GPUs, and 2 are here"):
        check_room(args, {"GPU": 2, "CPU": 16})
    check_room(args, {"GPU": 3, "CPU": 16})


def test_the_arguments_in_the_kubernetes_file_of_the_documentation_exist():
    (text,) = re.findall(r"```yaml\n(apiVersion: ray.io.*?)```", Path("docs/clusters.md").read_text("utf-8"), re.DOTALL)
    (application,) = yaml.safe_load(yaml.safe_load(text)["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert getattr(importlib.import_module(module), function) is serve_fleet.build
    args = serve_fleet.make_parser().parse_intermixed_args(shlex.split(application["args"]["arguments"]))
    assert (args.replicas, args.max_replicas) == (2, 16)
