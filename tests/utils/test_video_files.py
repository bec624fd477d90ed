"""Usual video files are read as a player shows them. Bad ones give one clear line."""

import logging
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.video.file import count_frames, open_video, read_video_metadata
from utils.video.read import read_video, sample_frames, stream_video
from utils.video.write import VideoWriter

RED, GREEN, BLUE, WHITE = (220, 30, 40), (20, 200, 60), (30, 40, 230), (250, 250, 250)
CORNERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)


def quarters(height=32, width=48) -> np.ndarray:
    """Return a picture uint8 [H W 3] with red and green quarters above blue and white ones."""
    return CORNERS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def encode(path, images, *, times=None, codec="libx264", pix_fmt="yuv420p", rate=10, aspect=None, **options):
    """Write images with PyAV. Their times are `times` in milliseconds, or one every 1 / `rate` seconds."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "4"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = times[index] if times is not None else round(index * 1000 / rate)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels(count: int) -> list[np.ndarray]:
    """Return gray pictures. Each is brighter than the one before."""
    return [np.full((32, 32, 3), 20 + 200 * index // max(1, count - 1), np.uint8) for index in range(count)]


def set_matrix(path, a, b, c, d):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # of version 0: after times, ids, layer and volume
    data[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


ORIENTATIONS = {  # (a, b, c, d): a stored pixel (x, y) is shown at (a x + c y, b x + d y)
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "half a turn": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_turned_video_is_upright_everywhere(tmp_path, name):
    matrix, turned = ORIENTATIONS[name]
    path = encode(tmp_path / "phone.mp4", [quarters()] * 3)
    set_matrix(path, *matrix)
    expected = torch.from_numpy(turned(quarters()).copy())
    height, width = expected.shape[:2]
    for frames in (read_video(path), sample_frames(path, 2)):
        assert frames.shape[1:] == expected.shape
        assert (frames[:, 4::8, 4::8].float() - expected[4::8, 4::8]).abs().max() < 12
    streamed = torch.cat(list(stream_video(path, height, width, 10)))
    assert ((streamed[:, :, 4::8, 4::8] + 1) * 127.5 - expected[4::8, 4::8].permute(2, 0, 1)).abs().max() < 12


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48)), (None, (32, 48))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, size):
    path = encode(tmp_path / "dv.mp4", [quarters()], aspect=aspect)
    assert read_video(path).shape[1:3] == size
    set_matrix(path, 0, 1, -1, 0)  # the stored pixels are stretched before the picture is turned
    assert read_video(path).shape[1:3] == size[::-1]


def test_a_variable_rate_is_sampled_by_its_times(tmp_path):
    images, times = levels(5), [0, 40, 1040, 1100, 3100]
    path = encode(tmp_path / "phone.mkv", images, times=times)
    frames = torch.cat(list(stream_video(path, 32, 32, 16)))
    assert 50 <= len(frames) <= 52  # 3.1 s and the last frame's own length
    shown = [max(index for index, time in enumerate(times) if time <= 1000 * k / 16 + 1) for k in range(50)]
    expected = torch.tensor([int(images[index][0, 0, 0]) for index in shown])
    assert ((frames[:50].mean((1, 2, 3)) + 1) * 127.5 - expected).abs().max() < 4


@pytest.mark.parametrize("times", [[-300, -200, -100, 0], [5000, 5100, 5200, 5300], [0, 100, 900_000, 900_100]])
def test_time_begins_with_the_first_frame_and_a_break_in_it_is_no_pause(tmp_path, times):
    path = encode(tmp_path / "clip.mkv", levels(4), times=times, container_options={"avoid_negative_ts": "disabled"})
    assert len(list(stream_video(path, 32, 32, 10))) in (4, 5)
    assert len(read_video(path)) == 4


def test_one_frame_is_a_video(tmp_path):
    path = encode(tmp_path / "one.mp4", levels(1))
    assert len(read_video(path)) == len(list(stream_video(path, 16, 16, 10))) == count_frames(path) == 1
    assert len(sample_frames(path, 8)) == 1


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("ffv1", "yuv420p10le", "mkv"),
        ("ffv1", "yuv444p16le", "mkv"),
        ("ffv1", "bgr0", "mkv"),
        ("ffv1", "yuva420p", "mkv"),
        ("libx264", "yuv422p", "mp4"),
        ("mjpeg", "yuvj420p", "avi"),
        ("libvpx-vp9", "yuv420p", "webm"),
        ("qtrle", "argb", "mov"),
    ],
)
def test_colours_come_from_every_pixel_format(tmp_path, codec, pix_fmt, suffix):
    path = encode(tmp_path / f"clip.{suffix}", [quarters()] * 2, codec=codec, pix_fmt=pix_fmt)
    assert (read_video(path)[:, 4::8, 4::8].float() - torch.from_numpy(quarters())[4::8, 4::8]).abs().max() < 16


@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le", "gray16le"])
def test_gray_keeps_its_range(tmp_path, pix_fmt):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    frames = read_video(encode(tmp_path / "gray.mkv", [ramp], codec="ffv1", pix_fmt=pix_fmt))
    assert (frames[0].float() - torch.from_numpy(ramp)).abs().max() <= 3


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_neither_washed_out_nor_dark(tmp_path, transfer):
    """Of a phone's HDR video, white stays white, mid gray stays mid gray, and black stays black."""
    white = {16: 0.58, 18: 0.75}[transfer]  # the signals of BT.2408's reference white
    ramp = (np.array([0.0, white / 2, white, 1.0]) * 65535).astype(np.uint16)
    image = np.repeat(np.repeat(ramp[None, :, None], 32, 0), 16, 1).repeat(3, 2)
    with av.open(str(tmp_path / "hdr.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        frame = av.VideoFrame.from_ndarray(image, format="rgb48le")
        frame = frame.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=1)
        frame.color_trc, frame.color_primaries = transfer, 9
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    black, mid, bright, peak = read_video(tmp_path / "hdr.mkv")[0, 16, 8::16].float().mean(-1).tolist()
    assert black < 4 and 40 < mid < 150 and 190 < bright < 250 and peak > 250


def test_transparent_pixels_become_white(tmp_path):
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "argb"
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[:16] = (255, 10, 200, 30)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="argb")))
        container.mux(stream.encode(None))
    frame = read_video(tmp_path / "clip.mov")[0]
    assert frame[4, 4].tolist() == [10, 200, 30] and frame[20, 4].tolist() == [255, 255, 255]


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def bad_files(folder) -> dict[str, str]:
    """Write files that are not complete videos. Return the text that the error of each must contain."""
    whole = encode(folder / "whole.mp4", levels(40), container_options={"movflags": "faststart"}).read_bytes()
    write_sound(folder / "sound.mov")
    write_sound(folder / "sound.wav")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    (folder / "folder.mp4").mkdir()
    (folder / "cut.mp4").write_bytes(whole[:300])
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {folder / 'whole.mp4'}\n")
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder / 'whole.mp4'}\n#EXT-X-ENDLIST\n")
    return {
        "sound.mov": "only sound",
        "sound.wav": "only sound",
        "empty.mp4": "empty",
        "text.mp4": "not a video",
        "folder.mp4": "directory",
        "cut.mp4": "it has no pictures",
        "noise.mp4": "not a video",
        "list.mp4": "not a video",  # would name other files
        "list.m3u8": "not a video",
        "missing.mp4": "No such file",
        "x" * 5000: "too long",
        "nul\0.mp4": "null",
    }


def test_what_is_no_video_is_one_line(tmp_path):
    for name, text in bad_files(tmp_path).items():
        for read in (read_video, count_frames, lambda path: list(stream_video(path, 8, 8, 8))):
            with pytest.raises(UserError, match=r"^cannot read a video from") as caught:
                read(tmp_path / name)
            assert text in str(caught.value) and "\n" not in str(caught.value)
        assert read_video_metadata(tmp_path / name) == {}


def test_a_file_that_was_cut_off_gives_its_frames_and_one_warning(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = encode(tmp_path / "cut.mp4", noise, container_options={"movflags": "faststart"})
    assert count_frames(path) == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        frames = read_video(path)
    assert 5 < len(frames) < 30
    assert [record.message.count("is damaged after") for record in caplog.records] == [1]
    with pytest.raises(UserError, match=r"cannot read a video from .*cut"):
        count_frames(path)


def test_names_that_look_like_addresses_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "http:.mp4", "clip%03d.mp4", "-i.mp4", "concat:x|y.mp4"):
        with VideoWriter(name, 8) as writer:
            writer.write(torch.zeros(2, 3, 16, 16))
        assert len(read_video(name)) == 2


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", levels(2))
    monkeypatch.setattr("utils.video.file.MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="frames of 32x32 have more than 1,000 pixels"), open_video(path):
        pass
