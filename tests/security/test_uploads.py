"""Uploaded images are decoded a few at a time, within limits, in child processes."""

import asyncio
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from pipeline.serving import images, workers
from pipeline.serving.clips import Clip, Gallery
from pipeline.serving.limits import Limits
from pipeline.serving.visitors import Sessions
from tests.serving.browser import wait_until
from tests.serving.served import PATIENCE
from tests.serving.synthetic import SyntheticModel


def png(width: int, height: int, mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def lying_png() -> bytes:
    """Return a PNG whose header says 100 x 100 and whose data are much larger."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**8))) + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """Return a PNG with a compressed text chunk of 50 MB."""
    picture = png(8, 8)
    data = b"Comment\0\0" + zlib.compress(bytes(50 * 2**20))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return picture[:33] + chunk + picture[33:]


@pytest.mark.parametrize(
    "data",
    [
        png(9000, 9000, "1"),
        png(9000, 9000, "P", "GIF"),
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png(40, 40)[:60],
        b"%PDF-1.4" * 100,
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 1000,
    ],
    ids=["many pixels", "many pixels of a GIF", "nothing", "cut GIF", "svg", "cut", "pdf", "garbage"],
)
def test_what_is_not_such_an_image_is_refused_in_words(data):
    with pytest.raises(images.Refused, match=r"megapixels|this is not"):
        images.clean_image(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pictures_of_every_kind_are_kept_small(mode):
    data, width, height = images.clean_image(png(3000, 1500, mode))
    assert (width, height) == (1280, 640)
    assert Image.open(io.BytesIO(data)).mode == "RGBA"


@pytest.mark.parametrize("make", [lying_png, text_bomb])
def test_a_bomb_neither_hurts_nor_hangs(make):
    """The image is decoded or refused within the memory limit of its own process."""

    async def clean():
        return await workers.ImageDecoder(Limits()).clean(make())

    try:
        assert asyncio.run(clean())[1] <= 100
    except images.Refused as error:
        assert str(error)


def test_a_process_that_takes_too_much_is_ended(monkeypatch):
    module, data = "pipeline.serving.images", png(6000, 6000)
    code, out, _ = asyncio.run(workers.run_child(module, data=data, seconds=20, memory=100 * 2**20))
    assert code != 0 and not out
    monkeypatch.setattr(workers, "LIMITED", "import time; time.sleep(60)")
    assert asyncio.run(workers.run_child(module, seconds=0.5))[0] == -1


def test_uploads_are_decoded_two_at_a_time_and_nobody_waits_for_them(serve, monkeypatch):
    """One visitor may send two images at a time. More are refused for now. The server answers meanwhile."""
    running, most = [0], [0]
    release = asyncio.Event()

    async def slow_child(*_, **__):
        running[0] += 1
        most[0] = max(most[0], running[0])
        while not release.is_set():
            await asyncio.sleep(0.01)
        running[0] -= 1
        return 0, images.SIZE.pack(1, 1) + b"png", b""

    monkeypatch.setattr(workers, "run_child", slow_child)
    site = serve()
    with site.client() as client, ThreadPoolExecutor(12) as pool:
        url = f"/api/v1/sessions/{client.session}/image"

        def upload(address: str) -> int:
            with site.browser(address) as browser:
                return browser.put(url, content=png(8, 8)).status_code

        uploads = [pool.submit(upload, f"127.0.0.{2 + number // 3}") for number in range(12)]
        while sum(each.done() for each in uploads) < 4:  # the third of each address
            assert site.http.get("/healthz").status_code == 200
        assert site.server.uploads.total == 8
        assert all(each.result() == 503 for each in uploads if each.done())
        release.set()
        codes = [each.result() for each in uploads]
    assert sorted(codes) == [200] * 8 + [503] * 4
    assert most[0] == 2


def test_an_upload_that_is_cut_off_leaves_nothing(serve, caplog):
    site = serve()
    with site.client() as client:
        head = f"PUT /api/v1/sessions/{client.session}/image HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n\r\n"
        for _ in range(5):
            site.line(data=head.encode() + b"abc").close()
        url = f"/api/v1/sessions/{client.session}/image"
        wait_until(lambda: site.http.put(url, content=png(8, 8)).status_code == 200, PATIENCE)
    assert not [record for record in caplog.records if record.exc_info]


def test_images_in_memory_are_limited_and_the_greedy_pay():
    sessions = Sessions(Limits(image_bytes=1000))
    modest = sessions.greet(None, "modest")
    sessions.keep_image(modest, bytes(100))
    greedy = [sessions.greet(None, "greedy") for _ in range(5)]
    for session in greedy:
        sessions.keep_image(session, bytes(300))
    assert modest.image is not None
    assert [session.image is not None for session in greedy] == [False, False, True, True, True]


def test_a_gif_is_made_once_however_many_ask(tmp_path, monkeypatch):
    made = []

    async def child(module, clip, gif, *_, **__):
        made.append(gif)
        await asyncio.sleep(0.05)
        with open(gif, "wb") as file:
            file.write(b"GIF89a")
        return 0, b"", b""

    monkeypatch.setattr(workers, "run_child", child)
    gallery = Gallery(tmp_path, SyntheticModel.command)
    clips = []
    for number in range(5):
        path = tmp_path / f"a-{number:024x}.mp4"
        path.write_bytes(b"video")
        clips.append(Clip(f"{number:024x}", "s", "v", path, ["p"], 1, 1, 1, 1, 0, True, "make"))
        gallery.add(clips[-1])

    async def ask() -> list:
        maker = workers.GifMaker(gallery, Limits(gifs_waiting=3))
        asked = [maker.path(clip) for clip in [*clips[:3], *clips[:3], *clips]]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask())
    assert len(made) == len(set(made)) == 3
    assert sum(isinstance(answer, workers.Busy) for answer in answers) == 2
