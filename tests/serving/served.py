"""A synthetic model behind the real API on a port of this machine, and clients for it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import httpx
import pytest
from websockets.sync.client import connect

from pipeline.serving.api import create_app
from pipeline.serving.door import Door
from pipeline.serving.frames import HEADER
from pipeline.serving.guard import LOOPBACK, Access, Guard, proxy_check
from pipeline.serving.limits import Limits
from pipeline.serving.run import make_runner
from pipeline.serving.server import Server
from tests.serving.browser import wait_until
from tests.serving.synthetic import SyntheticModel, synthetic_server

PATIENCE = 60


class Site:
    """A running server."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.http = self.browser("127.0.0.1")

    def browser(self, address: str, **options) -> httpx.Client:
        """Return an HTTP client with a given address of this machine."""
        transport = httpx.HTTPTransport(local_address=address)
        base = f"http://127.0.0.1:{self.port}"
        return httpx.Client(base_url=base, transport=transport, trust_env=False, timeout=PATIENCE, **options)

    def line(self, address: str = "127.0.0.1", data: bytes = b"") -> socket.socket:
        """Open a TCP connection from an address of this machine, and send data."""
        line = socket.create_connection(("127.0.0.1", self.port), PATIENCE, source_address=(address, 0))
        line.sendall(data)
        return line

    def connect(self, address: str = "127.0.0.1", **options):
        options = {"proxy": None, "close_timeout": 0.2, "open_timeout": PATIENCE, "sock": self.line(address)} | options
        return connect(f"ws://127.0.0.1:{self.port}/api/v1/stream", **options)

    @contextmanager
    def client(self, session: str | None = None, **options):
        with self.connect(**options) as socket:
            yield Client(socket, session)


class Client:
    """A client that speaks the protocol of docs/api.md."""

    def __init__(self, socket, session: str | None = None) -> None:
        self.socket = socket
        self.seen: list[dict] = []  # all messages but frames
        self.send("hello", **({} if session is None else {"session": session}))
        self.session = self.wait_for("hello")["session"]

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind} | fields))

    def wait_for(self, kind: str) -> dict:
        """Wait for the next message of a kind and return it."""
        return self._next(lambda message: isinstance(message, dict) and message["type"] == kind)

    def frame(self) -> tuple:
        """Wait for the next frame, report it as shown, and return its header."""
        self.last = self._next(lambda message: isinstance(message, bytes))
        header = HEADER.unpack_from(self.last)
        self.send("shown", stream=header[1], frames=header[2] + 1)
        return header

    def _next(self, wanted: Callable[[dict | bytes], bool]) -> dict | bytes:
        deadline = time.monotonic() + PATIENCE
        while True:
            left = deadline - time.monotonic()
            assert left > 0, self.seen[-5:]
            message = self.socket.recv(timeout=left)
            if isinstance(message, str):
                message = json.loads(message)
                self.seen.append(message)
            if wanted(message):
                return message

    def frames_a_second(self, seconds: float) -> float:
        count, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.frame()
            count += 1
        return count / seconds


@pytest.fixture
def serve(tmp_path):
    """Give a function that serves a synthetic model. Several sites may run at the same time."""
    running = []

    def serve(
        model: SyntheticModel | None = None,
        *,
        max_viewers: int = 4,
        limits: Limits | None = None,
        access: Access | None = None,
        proxies: Sequence[str] = (),
        clips: int = 200,
        greeting: str = "",
        may_choose: bool = False,
    ) -> Site:
        limits = limits or Limits()
        options = {"max_viewers": max_viewers, "limits": limits, "clips": clips, "greeting": greeting}
        server = synthetic_server(tmp_path, model or SyntheticModel(), may_choose=may_choose, **options)
        server.load()
        listener = socket.create_server(("127.0.0.1", 0))
        app = Guard(create_app(server), access or Access(LOOPBACK), limits)
        runner = make_runner(app, Door(limits, proxy_check(proxies)), list(proxies))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((runner, thread, server))
        site = Site(server, listener.getsockname()[1])
        wait_until(lambda: runner.started)
        return site

    yield serve
    for runner, thread, server in running:
        runner.should_exit = True
        thread.join()
        server.close()
