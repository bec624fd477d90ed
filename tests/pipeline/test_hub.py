"""Every refusal of the hub is one line with the remedy. The client is real; the hub is a server here."""

import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, constants

from pipeline.hub import ask_hub, explain_refusal
from utils.errors import UserError

ANSWERS = {
    "missing": (404, "RepoNotFound", "no repository of this name, or it is private"),
    "private": (401, "RepoNotFound", "HF_TOKEN"),
    "forbidden": (403, "", "HF_TOKEN"),
    "gated": (403, "GatedRepo", "terms have to be accepted first"),
    "revision": (404, "RevisionNotFound", "no such revision"),
    "broken": (500, "", "answers with status 500"),
}


class Refusing(BaseHTTPRequestHandler):
    """Refuses each repository in the way that its name says."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        status, code, _ = next(answer for name, answer in ANSWERS.items() if name in self.path)
        body = json.dumps({"error": "refused"}).encode()
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": "refused", "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def refusing():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize("name", ANSWERS)
def test_each_refusal_is_one_line_with_its_reason(refusing, name):
    with pytest.raises(UserError) as caught:
        ask_hub(f"user/{name}", lambda: refusing.model_info(f"user/{name}"), otherwise="copy it by hand")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"user/{name}: cannot be downloaded: ") and line.endswith("; or copy it by hand")
    assert ANSWERS[name][2] in line


def test_a_hub_that_is_not_there_and_a_wrong_name_are_told_apart():
    api = HfApi(endpoint="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached .* check the network"):
        ask_hub("user/model", lambda: api.model_info("user/model"))
    with pytest.raises(UserError, match="check the name"):
        ask_hub("a model", lambda: api.model_info("a model"))


def test_a_full_disk_is_seen_behind_the_clients_own_error():
    error = RuntimeError("download failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "disk is full" in explain_refusal(error, "user/model")


def test_whoever_is_offline_is_told_so(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert explain_refusal(FileNotFoundError("not in the cache"), "user/model").startswith("HF_HUB_OFFLINE is set")
