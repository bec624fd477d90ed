"""A server starts although published weights are missing. It says which, and downloads them if it is asked to.

The hub is a server on this machine, and its repository holds the files of a tiny release.
"""

import threading
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from model.weights import published
from pipeline.serving.models import Models
from pipeline.serving.spec import ModelSource
from tests.pipeline.test_download import Hub
from tests.serving.browser import wait_until
from tests.serving.served import Site
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]
PARTS = ("generator", "codec", "text_encoder")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def hub(release, monkeypatch):
    """Publish the parts of a release as the repository me/tiny, whose local folder is called tiny."""
    paths = [path for part in PARTS for path in (release.folder / part).rglob("*") if path.is_file()]
    files = {path.relative_to(release.folder).as_posix(): path.read_bytes() for path in paths}
    handler = type("Tiny", (Hub,), {"asked": [], "repository": "me/tiny", "files": files})
    monkeypatch.setattr(published, "REPOSITORIES", ((r"(?P<into>.*/tiny)(/.*)?", "me/tiny"),))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def answer_at(address: str) -> None:
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        answer_at(f"http://127.0.0.1:{server.server_port}")
        yield SimpleNamespace(handler=handler, files=files, answer_at=answer_at)
        server.shutdown()


@pytest.fixture
def source(release, tmp_path) -> ModelSource:
    """A model whose weights are not there."""
    parts = ", ".join(f"{part}: {{weights: {tmp_path}/tiny/{part}}}" for part in PARTS)
    path = tmp_path / "config.yaml"
    path.write_text(f"{{defaults: [{release.config_path}], {parts}}}")
    return ModelSource(str(path), offer_download=True)


def status(site: Site) -> dict:
    return site.http.get("/api/v1/status").json()


def press(site: Site, **headers: str):
    return site.http.post("/api/v1/download", headers=headers)


def test_missing_weights_are_named_downloaded_and_used(serve, hub, source, tmp_path):
    site = serve(Models(source))
    said = status(site)
    assert said["model"]["state"] == "missing" and site.http.get("/healthz").text == "missing\n"
    missing = said["missing"]
    assert {file["path"]: file["bytes"] for file in missing["files"]} == {
        str(tmp_path / "tiny" / name): len(data) for name, data in hub.files.items()
    }
    assert missing["bytes"] == sum(map(len, hub.files.values())) and "published as me/tiny" in missing["message"]
    assert press(site).status_code == 202
    wait_until(lambda: status(site)["model"]["state"] == "ready")
    assert status(site)["missing"] is None
    here = {path.relative_to(tmp_path / "tiny").as_posix(): path for path in (tmp_path / "tiny").rglob("*")}
    assert {name: path.read_bytes() for name, path in here.items() if path.is_file()} == hub.files
    with site.client() as client:
        client.send("start", prompt="a cat", num_frames=3)
        assert client.frame()
    assert press(site).status_code == 409


def test_a_download_shows_its_progress_and_can_be_tried_again(serve, hub, source, tmp_path):
    """The hub stops in the middle. What was downloaded is kept, and a server that starts now knows what is left."""
    site = serve(Models(source))
    everything = status(site)["missing"]["bytes"]
    hub.handler.stall_after = max(map(len, hub.files.values())) - 1
    assert press(site).status_code == 202
    wait_until(lambda: "downloading: 0.00 of" in (now := status(site)["model"])["stage"] and 0 < now["progress"] < 1)
    assert press(site).status_code == 409
    hub.handler.repository = "me/gone"
    hub.handler.stall_after = None
    wait_until(lambda: status(site)["model"]["state"] == "missing")
    assert "cannot be downloaded" in status(site)["problem"]
    hub.handler.repository = "me/tiny"
    other = status(serve(Models(source)))
    assert other["model"]["state"] == "missing" and 0 < other["missing"]["bytes"] < everything
    assert press(site).status_code == 202
    wait_until(lambda: status(site)["model"]["state"] == "ready")


def test_without_the_hub_the_server_starts_and_says_why(serve, hub, source):
    hub.answer_at(NOBODY)
    site = serve(Models(source))
    missing = status(site)["missing"]
    assert missing["files"] == [] and missing["bytes"] is None
    assert "cannot be reached" in missing["message"] and "hf download me/tiny" in missing["message"]


@pytest.mark.parametrize(
    "headers", [{"x-forwarded-for": "10.0.0.1"}, {"forwarded": "for=10.0.0.1"}, {"origin": "https://evil.example"}]
)
def test_only_the_person_at_the_machine_may_download(serve, hub, source, tmp_path, headers):
    site = serve(Models(source))
    assert press(site, **headers).status_code == 403
    assert site.browser("127.0.0.2").post("/api/v1/download").status_code == 403
    assert status(site)["model"]["state"] == "missing" and not (tmp_path / "tiny").exists()


def test_nothing_is_offered_to_visitors_or_if_nobody_publishes_it(hub, source, tmp_path):
    with pytest.raises(UserError, match="download it: hf download me/tiny"):
        Models(ModelSource(source.config_path)).load(lambda *_: None)
    unknown = ModelSource(source.config_path, settings=(f"codec.weights={tmp_path}/nowhere",), offer_download=True)
    with pytest.raises(UserError, match="nowhere: no such file") as error:
        Models(unknown).load(lambda *_: None)
    assert type(error.value) is UserError and not hub.handler.asked
