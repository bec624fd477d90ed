"""Visitors cannot fill the log, and their actions cause no traceback in it."""

import logging

import pytest

from pipeline.serving.logs import LINES_A_WINDOW, Bounded
from tests.serving.browser import wait_until
from tests.serving.served import PATIENCE


def record(message: str, *arguments, error: Exception | None = None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("server", logging.WARNING, __file__, 1, message, arguments, info)


def written(bounded: Bounded, *records: logging.LogRecord) -> list[str]:
    return [each.getMessage() for each in records if bounded.filter(each)]


def test_lines_of_one_kind_are_written_once_and_counted(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("pipeline.serving.logs.time.monotonic", lambda: now[0])
    bounded = Bounded()
    assert written(bounded, *(record("bad request from %s", f"10.0.0.{i}") for i in range(100))) == [
        "bad request from 10.0.0.0"
    ]
    now[0] += 61
    (line,) = written(bounded, record("ready"))
    assert "99 lines" in line


def test_lines_of_many_kinds_are_limited():
    lines = written(Bounded(), *(record(f"bad path {i}") for i in range(1000)))
    assert len(lines) == LINES_A_WINDOW


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), TimeoutError()])
def test_a_client_that_left_is_no_traceback(error):
    left, bug = record("failed", error=error), record("bug", error=KeyError("x"))
    bounded = Bounded()
    assert bounded.filter(left) and left.exc_info is None
    assert bounded.filter(bug) and bug.exc_info is not None


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /api/v1/stream HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"PUT /api/v1/sessions/x/image HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"GET /api/v1/clips/a.mp4 HTTP/1.1\r\nhost: localhost\r\nrange: bytes=9-1,-,x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=["zeros", "version", "half websocket", "path", "target", "negative length", "range", "long head"],
)
def test_what_a_client_sends_is_no_traceback(serve, caplog, data):
    site = serve()
    for _ in range(3):
        try:
            line = site.line(data=data)
            line.settimeout(2)  # some get no answer before the server's own limit
            line.recv(1000)
        except OSError:
            pass
    wait_until(lambda: site.http.get("/healthz").status_code == 200, PATIENCE)
    assert not [each for each in caplog.records if each.exc_info], caplog.text
