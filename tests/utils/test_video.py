"""A written video has the same size, number, order and colours of frames when it is read."""

import json
import math
import resource
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import UserError
from utils.frames import enlarge, to_uint8
from utils.gif import write_gif
from utils.previews import contact_sheet, save_contact_sheet
from utils.spacing import evenly_spaced
from utils.video import write
from utils.video.file import read_video_metadata
from utils.video.read import read_video, stream_video
from utils.video.write import VideoWriter

X264_PARAMS = write.X264["x264-params"]
COLOURS = torch.tensor([[220, 30, 40], [20, 200, 60], [30, 40, 230], [240, 220, 30], [30, 30, 30]])


def moving_squares(num_frames: int, height: int = 48, width: int = 48) -> torch.Tensor:
    """Return squares of several colours on grey that move right by one pixel a frame: float [F 3 H W] in [-1, 1]."""
    frames = torch.full((num_frames, 3, height, width), 0.5)
    for t in range(num_frames):
        for i, colour in enumerate(COLOURS):
            frames[t, :, 2 + 9 * i : 9 + 9 * i, 2 + t + 5 * i : 12 + t + 5 * i] = (colour / 127.5 - 1)[:, None, None]
    return frames


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / (a.float() - b.float()).square().mean().clamp(min=1e-6).item())


def test_to_uint8_covers_the_whole_range_and_passes_uint8():
    frames = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).reshape(1, 3, 1, 2).to(torch.bfloat16)
    assert to_uint8(frames).flatten().tolist() == [0, 128, 255, 0, 255, 191]
    pixels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert to_uint8(pixels) is pixels
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not float"):
            to_uint8(wrong)


@pytest.mark.parametrize(("height", "width", "scale"), [(48, 48, 1), (48, 48, 4), (47, 33, 1), (47, 33, 3)])
def test_a_streamed_video_comes_back(tmp_path, height, width, scale):
    clip = moving_squares(9, height, width)
    with VideoWriter(tmp_path / "clip.mp4", fps=16, scale=scale) as writer:
        writer.write(clip[:1])
        writer.write(to_uint8(clip[1:]))
        assert not (tmp_path / "clip.mp4").exists()
    frames = read_video(tmp_path / "clip.mp4")
    even = [size * scale + size * scale % 2 for size in (height, width)]
    assert frames.shape == (9, *even, 3) and frames.dtype == torch.uint8
    unscaled = frames[:, : height * scale, : width * scale][:, scale // 2 :: scale, scale // 2 :: scale]
    assert psnr(unscaled, to_uint8(clip)) > (24 if scale == 1 else 38)  # unscaled, colour has half the resolution
    assert list(tmp_path.iterdir()) == [tmp_path / "clip.mp4"]


def test_the_video_is_what_every_player_takes(tmp_path):
    import av

    with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
        writer.write(moving_squares(5))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16 and stream.frames == 5
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def grainy(count: int) -> torch.Tensor:
    """Return frames [F 3 80 80] with motion and grain, which are hard to encode."""
    noise = torch.randn(count, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    return moving_squares(count, 80, 80) + 0.05 * noise


def test_the_file_is_the_same_beside_busy_processes_and_for_any_division_into_writes(tmp_path):
    clip, contents = grainy(24), set()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for parts in (1, 2, 3, 4) * 3:
            with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
                for part in clip.chunk(parts):
                    writer.write(part)
            contents.add((tmp_path / "clip.mp4").read_bytes())
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert len(contents) == 1


def test_the_file_is_the_same_on_a_cpu_without_vector_instructions(tmp_path, monkeypatch):
    contents = set()
    for more in ("", ":asm=0"):
        monkeypatch.setitem(write.X264, "x264-params", X264_PARAMS + more)
        with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
            writer.write(grainy(12))
        contents.add((tmp_path / "clip.mp4").read_bytes())
    assert len(contents) == 1


def test_colours_are_kept_without_a_bias(tmp_path):
    """Flat frames of every level are read with an error of at most 2 of 255 levels, on average at most a third."""
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(levels[:, None, None, None].expand(-1, 16, 16, 3))
    error = read_video(tmp_path / "clip.mp4").float().mean((1, 2)) - levels[:, None]
    assert error.abs().max() <= 2 and error.mean().abs() < 0.34


def test_nothing_but_a_video_needs_pyav(tmp_path):
    """Modules can be imported without PyAV. Only a video fails then, and the error says what to install."""
    code = f"""
import sys
sys.modules["av"] = None
import pipeline.session, trainer.trainer, trainer.report, utils.images, utils.tracking
from utils.video.read import read_video
try:
    read_video({str(tmp_path / "a.mp4")!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("UserError videos need PyAV") and "pip install av" in run.stdout


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path):
    clip = torch.full((3, 3, 15, 15), -0.5)
    clip[:, 0, -4:] = 1.0
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(clip)
    frames = read_video(tmp_path / "clip.mp4").float()
    torch.testing.assert_close(frames[:, 15], frames[:, 14], atol=8, rtol=0)
    torch.testing.assert_close(frames[:, :, 15], frames[:, :, 14], atol=8, rtol=0)


def test_what_is_being_written_can_be_watched_already(tmp_path):
    """As after a power cut, the partial file holds everything except about the last second."""
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        for _ in range(20):
            writer.write(moving_squares(8))
        (tmp_path / "copy.mp4").write_bytes((tmp_path / "clip.partial.mp4").read_bytes())
    frames, whole = read_video(tmp_path / "copy.mp4"), read_video(tmp_path / "clip.mp4")
    assert 100 <= len(frames) < len(whole) == 160
    assert torch.equal(frames[:-4], whole[: len(frames) - 4])  # the last ones may miss frames they build on


def test_the_first_frame_is_shown_at_once(tmp_path):
    import av

    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(moving_squares(20))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == [index / 8 for index in range(20)]


def test_a_video_carries_its_tags_while_it_is_written_and_afterwards(tmp_path):
    tags = {"title": "a cat 🐈", "comment": json.dumps({"prompt": 'say "é"\n', "seed": 3})}
    with VideoWriter(tmp_path / "clip.mp4", fps=8, metadata=tags) as writer:
        for _ in range(20):
            writer.write(moving_squares(8))
        partial = read_video_metadata(writer.partial)
    whole = read_video_metadata(tmp_path / "clip.mp4")
    assert tags.items() <= whole.items() and tags.items() <= partial.items()
    assert read_video_metadata(tmp_path / "nowhere.mp4") == {}


def test_a_stopped_video_plays_under_a_name_that_says_so_and_never_replaces_another(tmp_path):
    for count in (5, 9):
        with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
            writer.write(moving_squares(count))
            writer.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.partial-2.mp4", "clip.partial.mp4"]
    assert [len(read_video(tmp_path / f"clip.{name}.mp4")) for name in ("partial", "partial-2")] == [5, 9]


def test_an_error_keeps_what_plays_if_asked_to(tmp_path):
    with (
        pytest.raises(RuntimeError, match="stopped"),
        VideoWriter(tmp_path / "clip.mp4", fps=8, keep_partial=True) as writer,
    ):
        writer.write(moving_squares(20))
        raise RuntimeError("stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.partial.mp4"]
    assert len(read_video(writer.partial)) == 20


@contextmanager
def largest_file(limit: int):
    """Make every write beyond `limit` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 300_000])
def test_a_full_disk_keeps_what_plays_and_is_one_line(tmp_path, limit):
    """The complete video has about 1 MB."""
    noise = torch.rand(128, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with (
        largest_file(limit),
        pytest.raises(UserError, match=r"^cannot write .*clip\.mp4: File too large") as caught,
        VideoWriter(tmp_path / "clip.mp4", fps=8) as writer,
    ):
        for part in noise.split(8):
            writer.write(part)
    left = [path.name for path in tmp_path.iterdir()]
    if limit < 1000:  # not even the header
        assert left == []
    else:
        assert left == ["clip.partial.mp4"] and "clip.partial.mp4, which can be played" in str(caught.value)
        assert len(read_video(tmp_path / left[0])) > 8


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "other").write_text("kept")
    for name in ("clip.partial.mp4", "clip.mp4"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(moving_squares(3))
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "clip.mp4").is_symlink() and (tmp_path / "clip.partial.mp4").is_symlink()


@pytest.mark.parametrize(
    ("fps", "rate"), [(16, 16), (23.976, (24000, 1001)), (29.97, (30000, 1001)), (12.5, (25, 2)), (0.5, (1, 2))]
)
def test_a_rate_is_exact(tmp_path, fps, rate):
    import av

    with VideoWriter(tmp_path / "clip.mp4", fps=fps) as writer:
        writer.write(moving_squares(3))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == (rate if isinstance(rate, int) else Fraction(*rate))


@pytest.mark.parametrize(
    ("fps", "expected"), [(8, range(6)), (4, range(0, 6, 2)), (16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])]
)
def test_a_streamed_video_keeps_its_speed_at_any_rate(tmp_path, fps, expected):
    clip = torch.linspace(-0.9, 0.9, 6).view(6, 1, 1, 1).expand(6, 3, 32, 64)
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(clip)
    frames = torch.cat(list(stream_video(tmp_path / "clip.mp4", 16, 16, fps)))
    assert frames.shape == (len(expected), 3, 16, 16)
    assert (frames.mean((1, 2, 3)) - clip[list(expected), 0, 0, 0]).abs().max() < 0.03


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"), VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(moving_squares(3))
        raise RuntimeError("stopped")
    with pytest.raises(ValueError, match="do not fit"), VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(moving_squares(3))
        writer.write(moving_squares(3, height=50))
    with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / "clip.mp4", fps=8):
        pass
    assert list(tmp_path.iterdir()) == []
    for wrong in ({"fps": 0}, {"fps": 8, "scale": 0}):
        with pytest.raises(ValueError, match="must be"):
            VideoWriter(tmp_path / "clip.mp4", **wrong)


def test_a_gif_keeps_frames_colours_and_speed(tmp_path):
    clip = moving_squares(6)
    write_gif(tmp_path / "clip.gif", enlarge(to_uint8(clip), 2).numpy(), fps=10)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (6, (96, 96), 100, 0)
        gif.seek(5)
        last = torch.from_numpy(np.array(gif.convert("RGB")))
    assert psnr(last[::2, ::2], to_uint8(clip)[5]) > 35


def test_evenly_spaced_includes_both_ends():
    assert evenly_spaced(33, 5) == [0, 8, 16, 24, 32]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(9, 1) == [0]


def test_a_contact_sheet_has_a_labelled_row_per_clip(tmp_path):
    clips = [moving_squares(9), moving_squares(3, 40, 64), to_uint8(moving_squares(12, 300, 500))]
    labels = ["short", "a long label " * 20, "an unbreakable " + "w" * 400]
    save_contact_sheet(tmp_path / "sheet.png", clips, labels, columns_frames=4)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    rows_with_colour = ((sheet.max(-1) - sheet.min(-1)) > 60).any(1)
    starts = np.flatnonzero(np.diff(rows_with_colour.astype(int)) == 1)
    assert len(starts) >= 3 and sheet.shape[1] > 4 * 144
    first = sheet[: starts[0]]
    assert (first < 100).any(), "the first label is written above its row"
    assert (sheet[:, -8:] == 255).all(), "no label runs past the margin"
    smaller = contact_sheet(clips[:1], labels[:1], columns_frames=4, scale=1)
    assert smaller.width < 4 * 48 + 60
    with pytest.raises(ValueError, match="3 clips and 1 labels"):
        contact_sheet(clips, labels[:1])
