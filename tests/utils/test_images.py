"""Usual image files are read as a viewer shows them. Bad ones give one clear line."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from utils.errors import UserError
from utils.images import load_image, read_image

RED, GREEN, BLUE, WHITE = (220, 30, 40), (20, 200, 60), (30, 40, 230), (250, 250, 250)
QUARTERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(16, axis=0).repeat(24, axis=1)
RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(8, 0)


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.array(image).astype(int)


TURNS = {  # EXIF orientation: what a viewer does
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_an_image_is_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(QUARTERS).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    expected = TURNS[orientation](QUARTERS)
    shown = pixels(tmp_path / f"a.{suffix}")
    assert shown.shape == expected.shape and np.abs(shown - expected)[4::8, 4::8].max() <= 8


def float_ramp(white: float) -> Image.Image:
    return Image.fromarray((RAMP / 65535 * white).astype(np.float32))


DEEP = {
    "16-bit PNG": ("png", lambda: Image.fromarray(RAMP)),
    "16-bit TIFF": ("tiff", lambda: Image.fromarray(RAMP)),
    "32-bit TIFF with 16-bit values": ("tiff", lambda: Image.fromarray(RAMP.astype(np.int32))),
    "32-bit TIFF": ("tiff", lambda: Image.fromarray((RAMP.astype(np.int64) << 15).astype(np.int32))),
    "float TIFF of fractions": ("tiff", lambda: float_ramp(1.0)),
    "float TIFF of 8-bit values": ("tiff", lambda: float_ramp(255.0)),
    "float TIFF of 16-bit values": ("tiff", lambda: float_ramp(65535.0)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_gray_keeps_its_range(tmp_path, name):
    suffix, make = DEEP[name]
    make().save(tmp_path / f"a.{suffix}")
    expected = np.arange(256)[None, :, None].repeat(8, 0).repeat(3, 2)
    assert np.abs(pixels(tmp_path / f"a.{suffix}") - expected).max() <= 1


def test_what_is_no_number_is_black(tmp_path):
    values = np.array([[0.0, 0.5, 1.0, np.nan, -3.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])  # RGB, gray and alpha, RGB and alpha
def test_16_bit_colour_keeps_its_range(tmp_path, colour, channels):
    values = RAMP[:1, :, None].repeat(channels, 2)
    if channels in (2, 4):
        values = values.copy()
        values[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(png(256, 1, 16, colour, b"\0" + values.astype(">u2").tobytes()))
    assert np.abs(pixels(tmp_path / "a.png")[0, :, 0] - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    gray = np.full((16, 16, 3), 255, np.uint8)
    gray[:8] = 0
    if mode == "LAB":
        lab = np.full((16, 16, 3), 128, np.uint8)
        lab[:8, :, 0], lab[8:, :, 0] = 0, 255  # lightness; 128 is no colour
        image = Image.merge("LAB", [Image.fromarray(np.ascontiguousarray(lab[..., i])) for i in range(3)])
    else:
        image = Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "a.tiff")
    shown = pixels(tmp_path / "a.tiff")
    assert shown[4, 4].max() <= 4 and shown[12, 4].min() >= 250


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.fromarray(QUARTERS).convert("CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
    assert np.abs(pixels(tmp_path / "a.jpg")[4::8, 4::8] - QUARTERS[4::8, 4::8]).max() < 12


def swapped_profile() -> bytes:
    """Return a colour profile whose first channel is blue and whose last channel is red."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, other in ((b"rXYZ", b"bXYZ"), (b"rTRC", b"bTRC")):
        first, second = (data.index(name, 128) + 4 for name in (tag, other))
        data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_is_applied(tmp_path, mode):
    Image.fromarray(QUARTERS).convert(mode).save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert np.abs(pixels(tmp_path / "a.png") - QUARTERS[..., ::-1]).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_a_profile_that_does_not_fit_is_left_out(tmp_path, mode):
    for number, profile in enumerate((b"nonsense", swapped_profile() if mode in ("L", "CMYK") else b"\0" * 200)):
        image = Image.fromarray(QUARTERS).convert(mode)
        image.save(tmp_path / f"{number}.tiff", icc_profile=profile)
        expected = np.array(image.convert("RGB")).astype(int)
        assert np.abs(pixels(tmp_path / f"{number}.tiff") - expected).max() <= 2


def test_what_is_transparent_becomes_white(tmp_path):
    alpha = np.dstack([QUARTERS, np.full(QUARTERS.shape[:2], 255, np.uint8)])
    alpha[:16, :, 3], alpha[16:, :, 3] = 0, 128
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    Image.fromarray(alpha).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "colour_key.png", transparency=0)
    palette = Image.fromarray(QUARTERS).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((2, 2)))
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((2, 2)))
    for name in ("rgba.png", "la.png", "colour_key.png", "palette.png", "palette.gif"):
        assert pixels(tmp_path / name)[2, 2].tolist() == [255, 255, 255], name
    halfway = (QUARTERS[30, 2].astype(int) + 255) / 2
    assert np.abs(pixels(tmp_path / "rgba.png")[30, 2] - halfway).max() <= 1
    assert np.abs(pixels(tmp_path / "palette.png")[30, 2] - BLUE).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(tmp_path / f"a.{suffix}")[8, 8] - (255, 0, 0)).max() <= 4


def test_an_image_covers_the_frame_and_is_cropped_around_the_centre(tmp_path):
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 20, 20)
    assert image.shape == (3, 20, 20) and image.dtype == torch.float32
    assert (image[0] > 0.85).all() and (image[1:] < -0.99).all()


def encoded(format: str, size=(64, 64)) -> bytes:
    Image.effect_noise(size, 80).convert("RGB").save(file := io.BytesIO(), format)
    return file.getvalue()


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_image_is_one_line(tmp_path, format):
    data, random = encoded(format), np.random.default_rng(0)
    damaged = [data[: len(data) * part // 100] for part in (1, 10, 50, 90)]
    for _ in range(20):
        flipped = bytearray(data)
        for place in random.integers(8, len(data), 8):
            flipped[place] ^= int(random.integers(1, 256))
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        (tmp_path / "a").write_bytes(content)
        try:
            load_image(tmp_path / "a", 8, 8)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"cannot read an image from {tmp_path / 'a'}: ") and "\n" not in str(error)
    assert refused >= 3


def test_what_is_no_image_is_one_line(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for name, text in {
        "empty.png": "is empty",
        "text.png": "is not one of",
        "program.eps": "is not one of",  # which Pillow would run in Ghostscript
        "photo.heic": "HEIC image; convert it with: magick '",
        "missing.png": "No such file",
        ".": "directory",
        "x" * 5000: "too long",
        "nul\0.png": "null",
    }.items():
        with pytest.raises(UserError, match=r"^cannot read an image from") as caught:
            load_image(tmp_path / name, 8, 8)
        assert text in str(caught.value) and "\n" not in str(caught.value), name


@pytest.mark.parametrize("size", [(40_000, 40_000), (12_000, 8_000)])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    """The second size is below Pillow's own limit. The files have no pixel data, so decoding would fail differently."""
    (tmp_path / "bomb.png").write_bytes(png(*size, 8, 2, b""))
    with pytest.raises(UserError, match="has more than 80,000,000 pixels; make it smaller first"):
        load_image(tmp_path / "bomb.png", 8, 8)
