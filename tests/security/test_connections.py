"""Idle and slow connections are closed. Nobody can use up the connections of others."""

import select
import socket
import time
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed

from pipeline.serving.limits import Limits
from tests.serving.browser import wait_until
from tests.serving.served import PATIENCE

SHORT = Limits(head=0.6, idle=1.2)
STRANGER = "127.0.0.2"
UPLOAD = b"PUT /api/v1/sessions/%s/image HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"


def is_closed(line: socket.socket) -> bool:
    """Return whether the server has closed a connection. Data that it has sent before are read."""
    line.setblocking(False)
    try:
        while data := line.recv(65536):
            assert data
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def closes(line: socket.socket, drip: bytes = b"", *, reads: bool = True) -> bool:
    """Return whether the server closes a connection on which a few bytes are sent now and then."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            line.send(drip)
            if not reads:  # the other end is known to be gone when sending fails or the line hangs up
                poll = select.poll()
                poll.register(line, select.POLLHUP | select.POLLERR)
                if poll.poll(0):
                    return True
            elif is_closed(line):
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"GET /healthz HTTP/1.1\r\nhost: loc", b""),
        (b"GET /healthz HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET /api/v1/stream HTTP/1.1\r\nupgrade: websocket\r\n", b""),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", b""),
        (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999\r\n\r\n", b"a"),
        (b"\x16\x03\x01", b""),
    ],
    ids=[
        "silent",
        "half a head",
        "a drip of a head",
        "half an upgrade",
        "a drip of a body",
        "idle",
        "late body",
        "TLS",
    ],
)
def test_who_does_not_finish_a_request_is_cut_off(serve, sent, drip):
    assert closes(serve(limits=SHORT).line(data=sent), drip)


def test_a_slow_upload_is_cut_off(serve):
    site = serve(limits=SHORT)
    with site.client() as client:
        assert closes(site.line(data=UPLOAD % client.session.encode()), b"a")
        wait_until(lambda: site.server.uploads.total == 0, PATIENCE)


def test_who_does_not_read_its_answers_is_cut_off(serve):
    """The client sends endless requests and reads no answer."""
    site = serve(limits=Limits(head=0.6, idle=1.2, requests=10_000))
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(0.1)
    line.connect(("127.0.0.1", site.port))
    asked = b"GET /page/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n"
    deadline = time.monotonic() + 3 * PATIENCE
    with pytest.raises(ConnectionError):
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                line.send(asked)


def test_a_websocket_without_hello_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr("pipeline.serving.connection.HELLO_SECONDS", 0.3)
    site = serve()
    with pytest.raises(ConnectionClosed):
        site.connect().recv(timeout=PATIENCE)
    wait_until(lambda: site.server.connections == 0, PATIENCE)


def test_an_idle_crowd_does_not_keep_anybody_out(serve):
    """This holds for the same address and for another one, whichever limit is reached."""
    site = serve(limits=Limits(connections=30, connections_each=20))
    crowd = [site.line(data=b"GET /" if number % 2 else b"") for number in range(60)]
    assert site.http.get("/healthz").status_code == 200
    crowd += [site.line("127.0.0.3") for _ in range(30)]
    with site.browser(STRANGER) as browser:
        for _ in range(3):
            assert browser.get("/healthz").status_code == 200
    open_lines = [line for line in crowd if not is_closed(line)]
    assert len(open_lines) <= 30
    for line in crowd:
        line.close()


def test_busy_connections_of_one_address_are_limited_and_told_so(serve):
    site = serve(limits=Limits(connections_each=5))
    clients = [site.connect() for _ in range(5)]
    assert site.http.get("/healthz").status_code == 503
    with site.browser(STRANGER) as browser:
        assert browser.get("/healthz").status_code == 200
    for client in clients:
        client.close()
    wait_until(lambda: site.http.get("/healthz").status_code == 200, PATIENCE)


def test_connections_leave_files_for_the_rest(monkeypatch):
    from pipeline.serving.limits import connection_limit

    for files, most in ((256, 96), (1024, 400), (2**20, 400), (100, 16)):
        monkeypatch.setattr("pipeline.serving.limits.open_file_limit", lambda files=files: files)
        assert connection_limit(Limits()) == most


def test_one_address_that_asks_without_end_does_not_slow_down_another(serve):
    """Too many requests are answered at the rate of the limit. /healthz answers every address meanwhile."""
    site = serve(limits=Limits(requests=0.1, longest_wait=0.5))  # one, and then one in ten seconds
    assert [site.http.get("/api/v1/status").status_code for _ in range(5)] == [200, 429, 429, 429, 429]
    with site.browser(STRANGER) as browser:
        assert browser.get("/api/v1/status").status_code == 200
    assert site.http.get("/healthz").status_code == 200
