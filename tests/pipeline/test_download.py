"""Exactly the missing weights are downloaded. Their sizes are logged first, and a stopped download continues.

The hub is a server on this machine that speaks the protocol of the real one.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelInfo
from huggingface_hub.hf_api import RepoSibling

from model.weights.published import not_found, published
from pipeline.remote_file import RemoteFile
from tests.pipeline import downloads
from tests.serving.browser import wait_until
from utils.errors import UserError
from utils.locks import try_lock

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
FILES = {
    "config.json": b"{}",
    "diffusion_pytorch_model.safetensors": os.urandom(1000) + bytes(25_000_000),  # the client writes pieces of 10 MB
    "models_t5_umt5-xxl-enc-bf16.pth": os.urandom(500_000),
    "Wan2.1_VAE.pth": os.urandom(200_000),
    "google/umt5-xxl/tokenizer.json": b'{"a": 1}',
    "google/umt5-xxl/spiece.model": os.urandom(1000),
    "assets/huge_picture.jpg": b"x" * 1000,
    "README.md": b"# Wan",
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses."""

    asked: list[str]
    repository = REPOSITORY
    files = FILES
    stall_after: int | None = None
    """Bytes of an answer after which nothing comes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith(f"/api/models/{self.repository}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in self.files.items()
            ]
            self._answer(json.dumps(entries).encode(), {})
        elif path.startswith(f"/api/models/{self.repository}"):
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": _etag(data)} for name, data in self.files.items()
            ]
            for entry in siblings[1:4]:
                sha256 = hashlib.sha256(self.files[entry["rfilename"]]).hexdigest()
                entry["lfs"] = {"size": entry["size"], "sha256": sha256, "pointerSize": 1}
            self._answer(json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode(), {})
        elif match := re.fullmatch(rf"/{self.repository}/resolve/[^/]+/(.+)", path):
            data = self.files[match[1]]
            self._answer(data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            self.send_error(404)

    def _answer(self, data: bytes, headers: dict[str, str]) -> None:
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:][: self.stall_after])
            while self.stall_after is not None and len(data) > self.stall_after:
                time.sleep(0.05)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path):
    handler = type("Recorded", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.handler, server.asked, server.url = handler, handler.asked, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen]:
    process = downloads.start_parent()
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def start_download(parent, tmp_path) -> Callable[..., downloads.Download]:
    """Give a function that starts to download from a hub below `tmp_path`."""

    def start(endpoint: str, **environment: str) -> downloads.Download:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        return downloads.start(parent, tmp_path, settings | {"HF_HUB_DOWNLOAD_TIMEOUT": "5"} | environment)

    return start


@pytest.fixture
def download(start_download) -> Callable[..., subprocess.CompletedProcess]:
    """Give a function that downloads from a hub below `tmp_path`."""
    return lambda endpoint, **environment: start_download(endpoint, **environment).wait()


def test_exactly_the_files_of_a_configuration_are_fetched_once(tmp_path, hub, download):
    done = download(hub.url)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "wan_models" / "Wan2.1-T2V-1.3B"
    here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert here == {name: data for name, data in FILES.items() if name not in ("README.md", "assets/huge_picture.jpg")}
    assert f"{REPOSITORY}: 6 files, 0.03 GB" in done.stderr
    hub.asked.clear()
    (folder / "Wan2.1_VAE.pth").write_bytes(FILES["Wan2.1_VAE.pth"][:1000])  # a copy that was cut off
    again = download(hub.url)
    assert again.returncode == 0, again.stderr
    assert (folder / "Wan2.1_VAE.pth").read_bytes() == FILES["Wan2.1_VAE.pth"]
    fetched = {line.split("/")[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"Wan2.1_VAE.pth"}
    assert (folder / "Wan2.1_VAE.pth.damaged").read_bytes() == FILES["Wan2.1_VAE.pth"][:1000]
    assert "every file is here" in download(hub.url).stderr


def test_a_download_that_breaks_off_is_one_line_and_continues(tmp_path, hub, start_download, download):
    """A process is killed after 10 MB; the next one asks for the rest only."""
    name = "diffusion_pytorch_model.safetensors"
    part = tmp_path / "wan_models" / "Wan2.1-T2V-1.3B" / f".{name}.{COMMIT[:12]}.part"
    hub.handler.stall_after = 15_000_000
    killed = start_download(hub.url)
    wait_until(lambda: part.stat().st_size >= 10_000_000)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait().returncode == -signal.SIGKILL
    hub.handler.stall_after = None
    hub.asked.clear()
    done = download(hub.url)
    assert done.returncode == 0, done.stderr
    (continued,) = [line for line in hub.asked if line.startswith("GET") and name in line]
    assert int(continued.partition("bytes=")[2].rstrip("-")) >= 10_000_000
    assert part.with_name(name).read_bytes() == FILES[name] and not part.exists()


@pytest.mark.parametrize(
    "environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["nobody answers", "the user wants to be offline"]
)
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_command(download, environment):
    failed = download("http://127.0.0.1:9", **environment)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "cannot be downloaded" in line and "hf download Wan-AI/Wan2.1-T2V-1.3B" in line
    assert ("HF_HUB_OFFLINE is set" if environment else "check the network") in line
    assert "Traceback" not in failed.stderr


def test_content_that_is_not_the_hubs_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.remote_file.http_get", lambda url, data, **_: data.write(b"evil"))
    file = RemoteFile("user/model", COMMIT, "weights/a.safetensors", 4, hashlib.sha256(b"good").hexdigest())
    with pytest.raises(UserError, match="not what the hub says"):
        file.download(tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "..\\a", ""])
def test_no_repository_writes_outside_its_folder(name):
    with pytest.raises(UserError, match="leads out of the folder"):
        RemoteFile.of(ModelInfo(id="user/model", sha=COMMIT), RepoSibling(rfilename=name, size=1))


def test_two_processes_do_not_write_one_file(tmp_path):
    file = RemoteFile("user/model", COMMIT, "a.safetensors", 4, None)
    with (tmp_path / f".a.safetensors.{COMMIT[:12]}.part").open("ab") as other:
        assert try_lock(other.fileno())
        with pytest.raises(UserError, match="another process downloads it"):
            file.download(tmp_path)


def test_each_known_path_names_its_repository():
    assert published("checkpoints/self_forcing_dmd.pt").patterns[0] == "checkpoints/self_forcing_dmd.pt"
    assert published("wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl").repository == REPOSITORY
    assert published("somewhere/else.pt") is None
    assert "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir ." in str(
        not_found("checkpoints/ode_init.pt")
    )
