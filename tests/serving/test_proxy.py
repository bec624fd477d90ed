"""The page below a path of a proxy that speaks TLS, in a real browser."""

from __future__ import annotations

import re
import socket
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
    """A TLS proxy: one request a connection, as nginx and Caddy pass them on."""

    def __init__(self, server: str, certificate: Path, *, takes_path_off: bool) -> None:
        self._port, self._takes_path_off = int(server.rpartition(":")[2]), takes_path_off
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"https://localhost:{listener.getsockname()[1]}{PATH}/"
        self._listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: ssl.SSLSocket) -> None:
        with suppress(OSError), line:
            line.do_handshake()
            head = b""
            while b"\r\n\r\n" not in head:
                data = line.recv(65536)
                if not data:
                    return
                head += data
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                server.sendall(self._changed(head))
                threading.Thread(target=copy, args=(line, server), daemon=True).start()
                copy(server, line)

    def _changed(self, head: bytes) -> bytes:
        if self._takes_path_off:
            head = head.replace(f" {PATH}/".encode(), b" /", 1)
        if b"upgrade: websocket" not in head.lower():
            head = re.sub(rb"(?im)^connection:.*\r\n", b"", head).replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
        return head.replace(b"\r\n", b"\r\nx-forwarded-for: 10.1.2.3\r\nx-forwarded-proto: https\r\n", 1)


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


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
    """Nothing is asked for outside the path; a video runs and its clip can be played."""
    proxy = Proxy(behind, certificate, takes_path_off=takes_path_off)
    try:
        page = open_page(proxy.address, ignore_https_errors=True)
        page.fill("#prompt", "a large red circle moving up and right on a navy background")
        page.press("#prompt", "Enter")
        page.wait_for_function("selfForcing.player.shown >= 3", timeout=30_000)
        page.click("#stop")
        page.wait_for_selector(".clip")
        page.wait_for_function("document.querySelector('.clip video').readyState >= 2", timeout=20_000)
    finally:
        proxy.close()
