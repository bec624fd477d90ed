"""Attack the demo with hostile visitors. Measure its memory, its threads, its answer times and its fairness."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image
from websockets.sync.client import connect

from scripts.endurance.figures import Figure

ROOT = Path(__file__).resolve().parents[2]
VISITS = 500
GREEDY, MODEST = "127.0.0.2", "127.0.0.3"
HEADER = struct.Struct("<B3xIII")
FPS = 12  # of the shipped model
PROMPT = "a large red circle moving up and right on a navy background"
REQUEST = "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {length}\r\n{more}\r\n"


def run(folder: Path, root: Path = ROOT) -> list[Figure]:
    """Measure the demo of a checkout, by default this one."""
    figures = []
    for part in (visits, uploads, sockets, shares, crowd, guesses):
        with demo(root, folder / part.__name__, "--auth=me:secret" if part is guesses else "") as server:
            figures += part(server)
    return figures


@dataclass
class Demo:
    """A running demo."""

    port: int
    process: psutil.Process

    def memory(self) -> float:
        """Return the megabytes of the process and its child processes."""
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 1e6

    def line(self, address: str, data: bytes = b"") -> socket.socket:
        """Open a TCP connection from an address of this machine."""
        line = socket.create_connection(("127.0.0.1", self.port), 10, source_address=(address, 0))
        line.sendall(data)
        return line

    @contextmanager
    def client(self, address: str) -> Iterator[Client]:
        """Yield a client of the stream."""
        url = f"ws://127.0.0.1:{self.port}/api/v1/stream"
        with connect(url, proxy=None, sock=self.line(address), open_timeout=20, close_timeout=0.2) as line:
            yield Client(line)


class Client:
    """A client that speaks the protocol of docs/api.md."""

    def __init__(self, line) -> None:
        self.line = line
        self._stream: int | None = None
        self._frames, self._first, self._reported = 0, 0.0, 0.0
        self.send("hello")
        self.session = self.next("hello")["session"]

    def send(self, kind: str, **fields: object) -> None:
        self.line.send(json.dumps({"type": kind} | fields))

    def next(self, kind: str, seconds: float = 20) -> dict:
        """Wait for the next message of a kind and return it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            message = self.line.recv(timeout=seconds)
            if isinstance(message, str) and (said := json.loads(message))["type"] == kind:
                return said
        raise TimeoutError(f"no {kind}")

    def watch(self, seconds: float) -> int:
        """Show frames at the model's pace for `seconds`. Return how many came."""
        begun, before = time.monotonic(), self._frames
        while (now := time.monotonic()) < begun + seconds:
            if self._stream is not None and now > self._reported + 0.1:
                due = int((now - self._first) * FPS) + 1
                self.send("shown", stream=self._stream, frames=min(self._frames, due))
                self._reported = now
            with suppress(TimeoutError):
                message = self.line.recv(timeout=0.05)
                if isinstance(message, bytes):
                    self._take(message)
        return self._frames - before

    def _take(self, frame: bytes) -> None:
        _, stream, number, _ = HEADER.unpack_from(frame)
        if stream != self._stream:
            self._stream, self._first = stream, time.monotonic()
        self._frames = number + 1


@contextmanager
def demo(root: Path, clips: Path, *options: str) -> Iterator[Demo]:
    """Run ``demo.py`` of a checkout. Yield it when the model is loaded."""
    command = [sys.executable, "demo.py", "--no-browser", "--port=0", f"--clips_folder={clips}", *filter(None, options)]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        server = Demo(port, psutil.Process(process.pid))
        if not options or not options[0]:
            wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(server: Demo) -> None:
    """Wait until the model is loaded. Raises TimeoutError."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5) as answer:
            if answer.read() == b"ready\n":
                return
        time.sleep(0.1)
    raise TimeoutError("the demo did not become ready")


class DemoHealth:
    """Asks for /healthz ten times a second, and keeps the times of the answers."""

    def __init__(self, server: Demo, address: str = "127.0.0.9") -> None:
        self._server, self._address = server, address
        self._done = threading.Event()
        self.seconds: list[float] = []
        self.failures = 0

    def __enter__(self) -> DemoHealth:
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        request = REQUEST.format(method="GET", path="/healthz", length=0, more="connection: close\r\n").encode()
        while not self._done.wait(0.1):
            started = time.monotonic()
            try:
                with self._server.line(self._address, request) as line:
                    self.failures += not line.recv(1000).startswith(b"HTTP/1.1 200")
            except OSError:
                self.failures += 1
            self.seconds.append(time.monotonic() - started)

    def figures(self, what: str) -> list[Figure]:
        """Return the 95th percentile of the answer times and the number of failures."""
        slow = 1000 * sorted(self.seconds)[int(0.95 * len(self.seconds))]
        return [
            Figure(f"/healthz during {what}, 95 of 100 answers within ms", round(slow), "at most 100", slow <= 100),
            Figure(f"/healthz during {what}, failures", self.failures, "0", not self.failures),
        ]


def visits(server: Demo) -> list[Figure]:
    """Connect, start, watch for a moment and leave, 500 times from 20 addresses."""
    failed = []

    def visit(number: int) -> None:
        try:
            with server.client(f"127.0.1.{1 + number % 20}") as client:
                client.send("start", prompt=PROMPT, seed=number)
                client.watch(0.2)
                if number % 2:
                    client.send("stop")
        except Exception as error:
            failed.append(error)

    for number in range(20):
        visit(number)
    time.sleep(5)
    memory, threads = server.memory(), server.process.num_threads()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(VISITS)))
    time.sleep(5)
    grown, more = server.memory() / memory - 1, server.process.num_threads() - threads
    return [
        Figure(f"{VISITS} visits: memory 5 s later, growth in %", round(100 * grown, 1), "at most 10", grown <= 0.1),
        Figure(f"{VISITS} visits: threads 5 s later, more than before ({threads})", more, "at most 10 %",
               more <= max(1, 0.1 * threads)),
        Figure(f"{VISITS} visits: refused or broken", len(failed), "0", not failed),
    ]  # fmt: skip


def uploads(server: Demo) -> list[Figure]:
    """Upload ten PNGs of about 120 kB and 39 megapixels at the same time, from ten addresses."""
    buffer = io.BytesIO()
    Image.new("RGB", (6200, 6400), "red").save(buffer, "PNG")
    data, peak, before = buffer.getvalue(), [0.0], server.memory()
    done = threading.Event()

    def upload(number: int) -> None:
        with server.client(f"127.0.2.{1 + number}") as client, suppress(OSError):
            path = f"/api/v1/sessions/{client.session}/image"
            head = REQUEST.format(method="PUT", path=path, length=len(data), more="").encode()
            with server.line(f"127.0.2.{1 + number}", head + data) as line:
                line.settimeout(60)
                line.recv(1000)

    def measure() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], server.memory())

    watcher = threading.Thread(target=measure)
    watcher.start()
    with DemoHealth(server) as health, ThreadPoolExecutor(10) as pool:
        list(pool.map(upload, range(10)))
    done.set()
    watcher.join()
    more = peak[0] - before
    return [
        Figure("10 uploads of 39 megapixels at once: more memory at the peak, MB", round(more), "at most 1,000",
               more <= 1000),
        *health.figures("uploads"),
    ]  # fmt: skip


def sockets(server: Demo) -> list[Figure]:
    """Open 300 connections from one address that send nothing, half a request, or a body byte by byte."""
    slow = REQUEST.format(method="PUT", path="/api/v1/sessions/x/image", length=10**6, more="").encode()
    lines = []
    for number in range(300):
        with suppress(OSError):
            lines.append(server.line(GREEDY, (b"", b"GET /healthz HTTP/1.1\r\nhost: ", slow)[number % 3]))
    with DemoHealth(server) as health:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for line in lines[2::3]:
                with suppress(OSError):
                    line.send(b"a")
            time.sleep(1)
    left = sum(not is_closed(line) for line in lines)
    for line in lines:
        line.close()
    return [
        Figure("300 idle, half and slow connections: open after 20 s", left, "0", not left),
        *health.figures("300 idle connections"),
    ]


def is_closed(line: socket.socket) -> bool:
    """Return whether the server has closed a connection."""
    line.setblocking(False)
    try:
        while line.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def shares(server: Demo) -> list[Figure]:
    """Let one address send 600 hellos and take every seat. Another visitor must keep its session and get a seat."""
    with server.client(MODEST) as modest:
        session = modest.session
    for _ in range(600):
        with suppress(Exception), server.client(GREEDY):
            pass
    head = REQUEST.format(method="GET", path=f"/api/v1/sessions/{session}/clips", length=0, more="").encode()
    with server.line(MODEST, head) as line:
        known = b" 200 " in line.recv(100)
    with ThreadPoolExecutor(8) as pool:
        ending = time.monotonic() + 12
        for _ in range(8):
            pool.submit(hold_a_seat, server, ending)
        time.sleep(3)
        with server.client(MODEST) as modest:
            modest.send("start", prompt=PROMPT)
            frames = modest.watch(6)
    return [
        Figure("another session is known after 600 hellos of one address", int(known), "1", known),
        Figure("frames in 6 s of one who comes when another holds all seats", frames, "above 20", frames > 20),
    ]


def hold_a_seat(server: Demo, ending: float) -> None:
    """Start a stream, show a little of it, and pause."""
    with suppress(Exception), server.client(GREEDY) as client:
        client.send("start", prompt=PROMPT)
        client.watch(2)
        while time.monotonic() < ending:
            client.send("pause")
            time.sleep(0.5)


def crowd(server: Demo) -> list[Figure]:
    """Measure the frames of a viewer while another address attacks with 50 connections."""
    with server.client(MODEST) as viewer:
        viewer.send("start", prompt=PROMPT)
        viewer.watch(3)
        alone = viewer.watch(10) / 10
        ending = time.monotonic() + 12
        with DemoHealth(server) as health, ThreadPoolExecutor(50) as pool:
            for number in range(50):
                pool.submit(misbehave, server, number, ending)
            time.sleep(1)
            beside = viewer.watch(10) / 10
    share = beside / alone
    return [
        Figure(
            "frames of a viewer beside 50 connections of another, %", round(100 * share), "at least 90", share >= 0.9
        ),
        *health.figures("a crowd"),
    ]


def misbehave(server: Demo, number: int, ending: float) -> None:
    """Attack in one of four ways until `ending`: endless starts, messages, requests or connections."""
    asked = REQUEST.format(method="GET", path="/api/v1/status", length=0, more="").encode()
    while time.monotonic() < ending:
        with suppress(Exception):
            if number % 4 == 0:
                with server.client(GREEDY) as client:
                    client.send("start", prompt=PROMPT, seed=number)
                    client.watch(0.5)
            elif number % 4 == 1:
                with server.client(GREEDY) as client:
                    while time.monotonic() < ending:
                        client.send("shown", stream=1, frames=1)
            elif number % 4 == 2:
                with server.line(GREEDY) as line:
                    while time.monotonic() < ending:
                        line.sendall(asked)
                        line.recv(65536)
            else:
                server.line(GREEDY, b"GET / HTTP/1.1\r\n").close()
                time.sleep(0.01)


def guesses(server: Demo) -> list[Figure]:
    """Send wrong passwords over 20 connections of one address for ten seconds."""
    looked_at, ending = [0], time.monotonic() + 10
    asked = REQUEST.format(method="GET", path="/healthz", length=0, more="authorization: Basic bWU6eA==\r\n").encode()

    def guess(_: int) -> None:
        while time.monotonic() < ending:
            with suppress(OSError), server.line(GREEDY) as line:
                while time.monotonic() < ending:
                    line.sendall(asked)
                    if not (answer := line.recv(1000)):
                        break
                    looked_at[0] += b" 401 " in answer

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(guess, range(20)))
    each = looked_at[0] / 10
    return [Figure("passwords of one address that are looked at, a second", each, "at most 1", each <= 1)]
