"""The page below a path of a proxy that speaks TLS, in a real browser."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.serving.browser import running

PATH = "/wan"


class Proxy:
    """A TLS proxy with one request for each connection, like nginx and Caddy.

    It runs in its own event loop, because two threads must not use one TLS connection at the same time.
    """

    def __init__(self, server: str, certificate: Path, *, takes_path_off: bool) -> None:
        self._port, self._takes_path_off = int(server.rpartition(":")[2]), takes_path_off
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        listener = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.address = f"https://localhost:{listener.sockets[0].getsockname()[1]}{PATH}/"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
            to_server.write(self._changed(head))
            await asyncio.gather(copy(reader, to_server), copy(from_server, writer))

    def _changed(self, head: bytes) -> bytes:
        if self._takes_path_off:
            head = head.replace(f" {PATH}/".encode(), b" /", 1)
        if b"upgrade: websocket" not in head.lower():
            head = re.sub(rb"(?im)^connection:.*\r\n", b"", head).replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
        return head.replace(b"\r\n", b"\r\nx-forwarded-for: 10.1.2.3\r\nx-forwarded-proto: https\r\n", 1)


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subject = ["-subj", "/CN=localhost", "-days", "2"]
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", f"{path}.crt", *subject],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip(f"no certificate without openssl: {made.stderr.decode()[-200:]}")
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture(scope="module")
def behind(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clips")
    options = ["--root-path", PATH, "--allowed-host", "localhost", "--trusted-proxy", "127.0.0.1"]
    with running("demo.py", "--no-browser", "--port", "0", "--clips_folder", folder, *options) as address:
        yield address


@pytest.mark.parametrize("takes_path_off", [True, False], ids=["path taken off", "path left"])
def test_the_demo_works_below_a_path_of_a_tls_proxy(behind, open_page, certificate, takes_path_off):
    """The page requests nothing outside the path. A video runs, and its clip can be played."""
    proxy = Proxy(behind, certificate, takes_path_off=takes_path_off)
    try:
        page = open_page(proxy.address, ignore_https_errors=True)
        page.fill("#prompt", "a large red circle moving up and right on a navy background")
        page.press("#prompt", "Enter")
        page.wait_for_function("selfForcing.player.shown >= 3")
        page.click("#stop")
        page.wait_for_selector(".clip")
        page.wait_for_function("document.querySelector('.clip video').readyState >= 2")
    finally:
        proxy.close()
