"""Two real replicas behind Ray Serve: one is killed, one hangs. Viewers of the other replica lose nothing.

This test needs Ray, which is not in the requirements: pip install -e '.[fleet]'.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from pipeline.serving.fleet import GREETING, replica_of
from pipeline.serving.frames import HEADER
from tests.serving.browser import wait_until

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install -e '.[fleet]'")

PROMPT = "a large red circle moving up and right on a navy background"
START_SECONDS = 180
RECONNECT_SECONDS = 10
HANG_SECONDS = 6


class Fleet:
    """A running serve_fleet.py."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port, self.log = port, folder / "log"
        command = [sys.executable, "-m", "tests.serving.hanging_fleet", "--replicas=2", "--gpus=0", f"--port={port}"]
        command += [f"--clips_folder={folder / 'clips'}", f"--hang-seconds={HANG_SECONDS}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def says(self, text: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return text in self.log.read_text()

    def processes(self) -> dict[str, int]:
        """Return replica -> process id, for each replica that has started."""
        return {name: int(pid) for name, pid in re.findall(r"replica (\S+) is process (\d+)", self.log.read_text())}


class Watcher:
    """A viewer that watches until :meth:`leave`. It connects again when its connection breaks."""

    def __init__(self, port: int, prompt: str = PROMPT) -> None:
        self.address, self.prompt = f"ws://127.0.0.1:{port}/api/v1/stream", prompt
        self.cookie, self.session, self.replica = "", None, None
        self.lines: list[list[tuple[float, int]]] = []  # of each connection: when a frame came, and its number
        self.texts: list[str] = []
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def frames(self) -> list[tuple[float, int]]:
        return self.lines[-1] if self.lines else []

    def leave(self) -> None:
        self.leaving.set()
        self.thread.join(10)

    def _run(self) -> None:
        while not self.leaving.wait(0.2):
            try:
                self._watch()
            except (WebSocketException, OSError):
                continue

    def _watch(self) -> None:
        headers = {"Cookie": self.cookie} if self.cookie else {}
        with connect(self.address, proxy=None, additional_headers=headers, close_timeout=1) as socket:
            if "set-cookie" in socket.response.headers:
                self.cookie = socket.response.headers["set-cookie"].partition(";")[0]
            self.replica = replica_of(self.cookie)
            self.lines.append([])
            socket.send(json.dumps({"type": "hello", "session": self.session}))
            self.session = json.loads(socket.recv())["session"]
            socket.send(json.dumps({"type": "start", "prompt": self.prompt}))
            while not self.leaving.is_set():
                self._take(socket, socket.recv(timeout=60))

    def _take(self, socket, message) -> None:
        if isinstance(message, str):
            self.texts.append(json.loads(message).get("message", ""))
            return
        _, stream, number, *_ = HEADER.unpack_from(message)
        self.lines[-1].append((time.monotonic(), number))
        socket.send(json.dumps({"type": "shown", "stream": stream, "frames": number + 1}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), free_port())
    wait_until(lambda: fleet.says("open http") and len(fleet.processes()) == 2, START_SECONDS)
    yield fleet
    fleet.process.send_signal(signal.SIGTERM)
    fleet.process.wait(60)


@pytest.fixture
def watch(fleet):
    watchers = []

    def watch(prompt: str = PROMPT) -> Watcher:
        watchers.append(Watcher(fleet.port, prompt))
        wait_until(lambda: watchers[-1].frames or (prompt == "hang" and watchers[-1].replica), 30)
        return watchers[-1]

    yield watch
    for watcher in watchers:
        watcher.leave()


def assert_nothing_was_lost(watcher: Watcher) -> None:
    assert len(watcher.lines) == 1 and not any(watcher.texts)
    assert [number for _, number in watcher.frames] == list(range(len(watcher.frames)))


def test_viewers_of_a_killed_replica_go_on_at_the_other_whose_viewers_lose_nothing(fleet, watch):
    watchers = [watch() for _ in range(4)]
    on = {name: [watcher for watcher in watchers if watcher.replica == name] for name in fleet.processes()}
    assert [len(each) for each in on.values()] == [2, 2], "new viewers go where the fewest are"
    killed, kept = on
    os.kill(fleet.processes()[killed], signal.SIGKILL)
    since = time.monotonic()
    wait_until(lambda: all(len(watcher.lines) == 2 and watcher.frames for watcher in on[killed]), 60)
    seconds = max(watcher.frames[0][0] for watcher in on[killed]) - since
    shown = [len(watcher.frames) for watcher in on[kept]]
    wait_until(lambda: all(len(w.frames) > count + 24 for w, count in zip(on[kept], shown, strict=True)), 30)
    print(f"\nthe first frame at the other replica came {seconds:.1f} s after the kill")
    assert seconds < RECONNECT_SECONDS
    assert all(watcher.replica == kept and GREETING in watcher.texts for watcher in on[killed])
    for watcher in on[kept]:
        assert_nothing_was_lost(watcher)
        moments = [moment for moment, _ in watcher.frames if moment > since - 1]
        print(f"longest pause of another viewer: {max(b - a for a, b in pairwise(moments)):.2f} s")
    wait_until(lambda: len(fleet.processes()) == 3, START_SECONDS)  # another one takes its place


def test_a_replica_that_hangs_is_replaced(fleet, watch):
    stuck = watch("hang")
    first = stuck.replica
    count, since = len(fleet.processes()), time.monotonic()
    other = watch()
    assert other.replica != first
    stuck.prompt = PROMPT
    wait_until(lambda: fleet.says(f"replica {first} hangs and ends"), 60)
    wait_until(lambda: len(stuck.lines) == 2 and stuck.frames, 60)
    print(f"\na hung replica's viewer saw frames again {time.monotonic() - since:.1f} s later")
    assert stuck.replica != first and GREETING in stuck.texts
    wait_until(lambda: len(fleet.processes()) == count + 1, START_SECONDS)
    assert_nothing_was_lost(other)
