"""Missing weights are fetched from a hub: exactly those, resumably, with their sizes said first.

The hub here is a server on this machine that speaks the protocol of the real one.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from model.weights.published import not_found, published

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
FILES = {
    "config.json": b"{}",
    "diffusion_pytorch_model.safetensors": os.urandom(300_000),
    "models_t5_umt5-xxl-enc-bf16.pth": os.urandom(500_000),
    "Wan2.1_VAE.pth": os.urandom(200_000),
    "google/umt5-xxl/tokenizer.json": b'{"a": 1}',
    "google/umt5-xxl/spiece.model": os.urandom(1000),
    "assets/huge_picture.jpg": b"x" * 1000,
    "README.md": b"# Wan",
}
DOWNLOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from pipeline.config import PipelineConfig
from pipeline.download import download_weights
from utils.errors import UserError
config = PipelineConfig()
config.generator.weights = "wan_models/Wan2.1-T2V-1.3B"
try:
    download_weights(config)
except UserError as error:
    sys.exit(f"error: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in FILES.items()
            ]
            self._answer(json.dumps(entries).encode(), {})
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name, "size": len(data), "blobId": _etag(data)} for name, data in FILES.items()]
            self._answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), {})
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            data = FILES[match[1]]
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
            self.wfile.write(data[start:])


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path):
    handler = type("Recorded", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.asked, server.url = handler.asked, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def download(folder, endpoint: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_DOWNLOAD_TIMEOUT": "5", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_exactly_the_files_of_a_configuration_are_fetched_once(tmp_path, hub):
    done = download(tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "wan_models" / "Wan2.1-T2V-1.3B"
    here = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }
    assert here == {name: data for name, data in FILES.items() if name not in ("README.md", "assets/huge_picture.jpg")}
    assert f"{REPOSITORY}: 6 files, 0.00 GB" in done.stderr
    hub.asked.clear()
    (folder / "Wan2.1_VAE.pth").write_bytes(FILES["Wan2.1_VAE.pth"][:1000])  # a copy that was cut off
    again = download(tmp_path, hub.url)
    assert again.returncode == 0, again.stderr
    assert (folder / "Wan2.1_VAE.pth").read_bytes() == FILES["Wan2.1_VAE.pth"]
    fetched = {line.split("/")[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"Wan2.1_VAE.pth"}
    assert (folder / "Wan2.1_VAE.pth.damaged").read_bytes() == FILES["Wan2.1_VAE.pth"][:1000]
    assert "every file is here" in download(tmp_path, hub.url).stderr


@pytest.mark.parametrize(
    "environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["nobody answers", "the user wants to be offline"]
)
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_command(tmp_path, environment):
    failed = download(tmp_path, "http://127.0.0.1:9", **environment)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "cannot be downloaded" in line and "hf download Wan-AI/Wan2.1-T2V-1.3B" in line
    assert "Traceback" not in failed.stderr


def test_each_known_path_names_its_repository():
    assert published("checkpoints/self_forcing_dmd.pt").patterns[0] == "checkpoints/self_forcing_dmd.pt"
    assert published("wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl").repository == REPOSITORY
    assert published("somewhere/else.pt") is None
    assert "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir ." in str(
        not_found("checkpoints/ode_init.pt")
    )
