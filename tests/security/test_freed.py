"""When a visit ends, its memory is freed at once, without a garbage collection."""

import gc
import socket
import threading
import weakref

from pipeline.serving import hub, recorder
from tests.serving.browser import wait_until
from tests.serving.served import PATIENCE, Client
from tests.serving.synthetic import CHUNK_FRAMES, SyntheticModel, SyntheticSession

VISITS = 6


class Watched(SyntheticModel):
    """Keeps weak references to its sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[weakref.ref] = []

    def open(self, spec) -> SyntheticSession:
        session = super().open(spec)
        self.sessions.append(weakref.ref(session))
        return session


def watched(monkeypatch, module, name: str) -> list[weakref.ref]:
    """Return a list that receives a weak reference to each new instance of a class."""
    made: list[weakref.ref] = []
    original = getattr(module, name)

    class Remembered(original):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, name, Remembered)
    return made


def visit(site, how: str) -> None:
    client = Client(site.connect())
    client.send("start", prompt="numbers", num_frames=3 if how == "ends" else None)
    client.frame()
    if how == "ends":
        for _ in range(CHUNK_FRAMES - 1):
            client.frame()
        client.wait_for("clip")
    elif how == "stops":
        client.send("stop")
        client.wait_for("clip")
    elif how == "restarts":
        client.send("start", prompt="again")
        client.wait_for("clip")
    elif how == "pauses":
        client.send("pause")
    if how == "drops":
        client.socket.socket.shutdown(socket.SHUT_RDWR)
    client.socket.close()


def test_all_of_a_visit_is_freed_at_once(serve, monkeypatch):
    model = Watched()
    site = serve(model)
    parts = [
        model.sessions,
        watched(monkeypatch, recorder, "ClipRecorder"),
        watched(monkeypatch, hub, "Viewer"),
    ]
    visit(site, "stops")
    gc.collect()
    gc.disable()
    try:
        threads = threading.active_count()
        for how in ("ends", "stops", "restarts", "pauses", "drops", "stops"):
            visit(site, how)
        wait_until(lambda: site.server.connections == 0 and site.server.hub.viewers == 0, PATIENCE)
        for refs in parts:
            wait_until(lambda refs=refs: not any(ref() for ref in refs), PATIENCE)
        assert len(model.sessions) >= VISITS
        wait_until(lambda: threading.active_count() <= threads + 2, PATIENCE)  # those that read clips come and go
    finally:
        gc.enable()
