"""The API as its clients use it, also hostile ones."""

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pipeline.serving.connection import MOST_MISTAKES
from pipeline.serving.guard import Access
from pipeline.serving.status import resident_bytes
from tests.serving.browser import wait_until
from tests.serving.served import PATIENCE, Site

CROWD = 60


def picture(size=(64, 48), kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Return a PNG of a few kilobytes with `side` pixels in width and height."""
    buffer = BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_stream_from_start_to_clip(serve):
    site = serve()
    with site.client() as client:
        client.send("start", prompt="numbers", num_frames=6, fps=60)
        headers = [client.frame() for _ in range(24)]
        assert [header[2] for header in headers] == list(range(24))
        clip = client.wait_for("clip")["clip"]
        assert client.session not in json.dumps(clip)
    assert [c["name"] for c in site.http.get(f"/api/v1/sessions/{client.session}/clips").json()] == [clip["name"]]
    video = site.http.get(f"/api/v1/clips/{clip['name']}.mp4")
    assert video.headers["content-type"] == "video/mp4" and video.content[4:8] == b"ftyp"
    assert site.http.get(f"/api/v1/clips/{clip['name']}.gif").content[:4] == b"GIF8"
    part = site.http.get(f"/api/v1/clips/{clip['name']}.mp4", headers={"range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10


def test_a_client_that_comes_back_finds_its_clips(serve):
    site = serve()
    with site.client() as client:
        client.send("start", prompt="numbers", num_frames=3, fps=60)
        for _ in range(12):
            client.frame()
        clip = client.wait_for("clip")["clip"]
    with site.connect() as socket:
        socket.send(json.dumps({"type": "hello", "session": client.session}))
        greeting = json.loads(socket.recv(timeout=PATIENCE))
    assert greeting["session"] == client.session
    assert [c["name"] for c in greeting["clips"]] == [clip["name"]]


def test_sessions_cannot_be_guessed_or_chosen(serve):
    site = serve()
    with site.connect() as socket:
        socket.send(json.dumps({"type": "hello", "session": "mine"}))
        session = json.loads(socket.recv(timeout=PATIENCE))["session"]
    assert session != "mine" and len(session) >= 32
    assert site.http.get("/api/v1/sessions/mine/clips").status_code == 404


def test_health_metrics_and_schema(serve):
    site = serve()
    assert site.http.get("/healthz").text == "ready\n"
    metrics = site.http.get("/metrics").text
    assert "self_forcing_connections 0\n" in metrics and "# TYPE self_forcing_frames_total counter\n" in metrics
    paths = site.http.get("/api/v1/openapi.json").json()["paths"]
    assert {"/healthz", "/metrics", "/api/v1/status", "/api/v1/options", "/api/v1/clips/{name}.{kind}"} <= set(paths)


def test_bad_messages_are_answered_and_forgiven(serve):
    bad = [
        "{",
        "[]",
        '"start"',
        "null",
        "{}",
        '{"type": "dance"}',
        '{"type": "start"}',
        '{"type": "start", "prompt": "  "}',
        '{"type": "start", "prompt": "a", "seed": -1}',
        '{"type": "start", "prompt": "a", "seed": "0"}',
        '{"type": "start", "prompt": "a", "height": 1e9}',
        '{"type": "start", "prompt": "a", "num_frames": 0}',
        '{"type": "start", "prompt": "a", "colour": "red"}',
        '{"type": "start", "prompt": "a", "image": true}',
        '{"type": "switch", "prompt": "a"}',
        '{"type": "shown", "stream": 1, "frames": -1}',
        json.dumps({"type": "start", "prompt": "a" * 2001}),
        b"\x00\x01",
        "[" * 10_000,
    ]
    with serve().client() as client:
        for message in bad:
            client.socket.send(message)
            assert client.wait_for("error")["message"], message
        client.send("start", prompt="numbers")
        client.frame()


def test_patience_ends(serve):
    with serve().client() as client:
        for _ in range(MOST_MISTAKES):
            client.send("dance")
        with pytest.raises(ConnectionClosed):
            while True:
                client.socket.recv(timeout=PATIENCE)


def test_ten_megabytes_of_prompt_are_not_read(serve):
    site = serve()
    with site.client() as client, pytest.raises(ConnectionClosed) as closed:
        client.send("start", prompt="a" * 10 * 2**20)
        while True:
            client.socket.recv(timeout=PATIENCE)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    with site.client() as other:
        other.send("start", prompt="numbers")
        other.frame()


def test_other_origins_are_refused(serve):
    site = serve()
    with pytest.raises(InvalidStatus), site.connect(origin="http://evil.example"):
        pass
    with site.client(origin=f"http://127.0.0.1:{site.port}") as client:
        foreign = {"origin": "http://evil.example"}
        put = site.http.put(f"/api/v1/sessions/{client.session}/image", content=picture(), headers=foreign)
    assert put.status_code == 403


def test_other_names_for_this_machine_are_refused(serve):
    """A foreign host name that resolves to 127.0.0.1 is refused."""
    site = serve()
    assert site.http.get("/healthz", headers={"host": "evil.example"}).status_code == 403
    assert site.http.get("/healthz", headers={"host": f"localhost:{site.port}"}).status_code == 200


def test_a_password_is_asked_for_everywhere(serve):
    site = serve(access=Access(None, accounts=("me:secret",)))
    for path in ("/healthz", "/api/v1/status", "/page/app.js"):
        assert site.http.get(path).status_code == 401
    assert site.http.get("/healthz", auth=("me", "wrong")).status_code == 401
    with pytest.raises(InvalidStatus), site.connect():
        pass
    answer = site.http.get("/healthz", auth=("me", "secret"))
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    with site.client(additional_headers={"cookie": cookie.partition(";")[0]}) as client:
        client.send("start", prompt="numbers")
        client.frame()


def test_uploads_are_images_or_nothing(serve):
    site = serve()
    with site.client() as client:
        url = f"/api/v1/sessions/{client.session}/image"
        assert site.http.put(url, content=picture()).json() == {"width": 64, "height": 48}
        for data in (b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", picture()[:60], b"%PDF-1.4" * 100):
            assert site.http.put(url, content=data).status_code == 415
        assert site.http.put(url, content=bytes(11 * 2**20)).status_code == 413
        for data in (bomb(7_000), bomb(20_000)):
            before = resident_bytes()
            refused = site.http.put(url, content=data)
            assert refused.status_code == 415 and "pixels" in refused.json()["detail"]
            assert resident_bytes() - before < 50e6
    assert site.http.put("/api/v1/sessions/unknown/image", content=picture()).status_code == 404


def test_clip_names_lead_nowhere_else(serve):
    site = serve()
    for name in ("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a/b", "x" * 5000, "%00", "~", "*"):
        for kind in ("mp4", "gif", "py"):
            assert site.http.get(f"/api/v1/clips/{name}.{kind}").status_code in (404, 307), name
    assert site.http.get("/page/..%2f..%2f..%2fdemo.py").status_code == 404


def test_a_hostile_prompt_stays_a_name(serve, tmp_path):
    """A prompt with path characters neither leaves the folder nor breaks the command."""
    site = serve()
    with site.client() as client:
        client.send("start", prompt="../../etc/passwd; rm -rf ~ 'x' \"y\" $(id) \u202e\x00", num_frames=3, fps=60)
        for _ in range(12):
            client.frame()
        name = client.wait_for("clip")["clip"]["name"]
    (file,) = tmp_path.glob(f"*{name}.mp4")
    assert file.parent == tmp_path


def test_a_crowd_comes_and_goes_while_one_watches(serve):
    """Clients that start, disconnect, hang or send nonsense neither disturb another viewer nor use up memory."""
    site = serve(max_viewers=3)
    half_open = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(20)]
    for number, line in enumerate(half_open):
        line.send(b"GET /api/v1/stream HTTP/1.1\r\nHost: " if number % 2 else b"")
    with site.client() as watcher:
        watcher.send("start", prompt="numbers", fps=24)
        watcher.frames_a_second(1.0)
        before = resident_bytes()
        with ThreadPoolExecutor(12) as pool:
            crowd = pool.map(lambda seed: rude_visit(site, random.Random(seed)), range(CROWD))
            rate = watcher.frames_a_second(3.0)
            list(crowd)
        assert rate >= 0.9 * 24
        wait_until(lambda: site.server.connections == 1, PATIENCE)
        wait_until(lambda: site.server.hub.viewers and not site.server.hub.waiting, PATIENCE)
        watcher.send("stop")
        watcher.wait_for("clip")
    wait_until(lambda: not site.server.hub.viewers, PATIENCE)
    assert resident_bytes() - before < 80e6
    for line in half_open:
        line.close()


def rude_visit(site: Site, chance: random.Random) -> None:
    """Connect, do something, and disconnect without closing."""
    try:
        line = site.connect(open_timeout=PATIENCE)
    except (OSError, TimeoutError, InvalidStatus):
        return
    kind = chance.randrange(5)
    try:
        if kind:
            line.send(json.dumps({"type": "hello"}))
        if kind > 1:
            line.send(json.dumps({"type": "start", "prompt": "numbers", "seed": chance.randrange(100)}))
        if kind == 3:
            line.send("{" * chance.randrange(1000))
        if kind == 4:
            for _ in range(chance.randrange(20)):
                line.send(json.dumps({"type": chance.choice(["pause", "resume", "stop", "start"]), "prompt": "x"}))
        time.sleep(chance.random() / 4)
    except ConnectionClosed:
        pass
    finally:
        line.socket.shutdown(socket.SHUT_RDWR) if chance.random() < 0.5 else line.close()
