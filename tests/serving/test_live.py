"""A live source: its frames reach the stream, and a stranger can send no more than its share."""

import io
import struct

import pytest
import torch
from PIL import Image

from pipeline.serving.frames import JPEG, RAW
from pipeline.serving.limits import Limits
from pipeline.serving.live import HEADER, MOST_FRAME_BYTES
from pipeline.serving.live_frames import frame_pixels
from pipeline.serving.live_source import MOST_WAITING, LiveSource
from tests.serving.browser import wait_until
from tests.serving.synthetic import CHUNK_FRAMES, SyntheticModel

SIDE = 48


def picture(level: int) -> bytes:
    return bytes([level]) * (3 * SIDE * SIDE)


def as_jpeg(level: int, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


def start(client, **fields) -> int:
    client.send("start", prompt="numbers", source=True, fps=24, **fields)
    return client.wait_for("seated")["stream"]


def send_frame(client, stream: int, data: bytes, kind: int = RAW) -> None:
    client.socket.send(HEADER.pack(kind, stream) + data)


@pytest.mark.parametrize("kind", [RAW, JPEG])
def test_the_stream_follows_its_source_and_ends_with_it(serve, kind):
    with serve(SyntheticModel()).client() as client:
        stream = start(client)
        for number in range(CHUNK_FRAMES):
            level = 10 * number
            send_frame(client, stream, picture(level) if kind == RAW else as_jpeg(level), kind)
        client.send("source_ended")
        levels = []
        for _ in range(CHUNK_FRAMES):
            client.frame()
            levels.append(client.last[-1])
        assert levels == pytest.approx([10 * number for number in range(CHUNK_FRAMES)], abs=2)
        assert client.wait_for("ended")["frames"] == CHUNK_FRAMES
        assert client.wait_for("clip")["clip"]["command"] == ""  # what was seen cannot be made again


def test_nothing_is_made_until_frames_come(serve):
    site = serve(SyntheticModel())
    with site.client() as client:
        stream = start(client)
        send_frame(client, stream, picture(1))
        client.send("pause")
        client.send("resume")
        send_frame(client, stream + 1, picture(2))  # of another stream
        assert site.server.hub.counters.chunks == 0


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (RAW, b"short"),
        (RAW, b""),
        (7, picture(1)),
        (JPEG, b"no picture"),
        (JPEG, as_jpeg(1, 2 * SIDE)),
        (JPEG, bytes(MOST_FRAME_BYTES + 1)),
    ],
)
def test_what_is_no_frame_is_one_line_and_nothing_else(serve, kind, data):
    site = serve(SyntheticModel())
    with site.client() as client:
        stream = start(client)
        send_frame(client, stream, data, kind)
        message = client.wait_for("error")["message"]
        assert "frame of the source" in message and "\n" not in message
        for _ in range(CHUNK_FRAMES):  # the stream still follows what comes then
            send_frame(client, stream, picture(5))
        client.wait_for("chunk")
    wait_until(lambda: site.server.sources.total == 0)


def test_a_short_binary_message_is_a_mistake(serve):
    with serve(SyntheticModel()).client() as client:
        client.socket.send(b"abc")
        assert "binary" in client.wait_for("error")["message"]


def test_a_visitor_follows_few_sources_at_once(serve):
    site = serve(SyntheticModel(), limits=Limits(sources_each=1))
    with site.client() as first, site.client() as second:
        start(first)
        second.send("start", prompt="numbers", source=True)
        assert "too many" in second.wait_for("error")["message"]
        first.send("start", prompt="numbers")
        first.wait_for("chunk")
        start(second)


def test_only_the_newest_frames_wait():
    source = LiveSource(1, 1)
    for level in range(3 * MOST_WAITING):
        source.push(bytes([level] * 3))
    assert next(source) == bytes([2 * MOST_WAITING] * 3)
    for _ in range(MOST_WAITING - 1):
        next(source)
    assert next(source) is None
    source.end()
    assert next(source, "over") == "over"


def test_a_header_that_lies_about_its_size_is_not_decoded():
    """A JPEG that says to have 65,000 x 65,000 pixels is refused by its header."""
    data = bytearray(as_jpeg(1))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65000, 65000)
    assert frame_pixels(bytes(data), (SIDE, SIDE)) == b""
    assert torch.frombuffer(bytearray(frame_pixels(as_jpeg(9), (SIDE, SIDE))), dtype=torch.uint8).float().mean() == 9
