"""Reads image files as a person sees them: upright, in 8-bit sRGB, opaque.

An image is decoded only if its header shows a supported format and a size within the limit.
"""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from utils.errors import UserError
from utils.frames import fit_image

MAX_PIXELS = 80_000_000  # 240 MB as RGB
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""The formats that are read. EPS is not, because it is a program, and Pillow would run it with Ghostscript."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ICC_MODES = ("RGB", "RGBA", "CMYK", "L", "LAB")
BACKGROUND = "white"


class ImageProblem(ValueError):
    """The reason why an image cannot be read, without its name."""


def load_image(source: str | Path | BinaryIO, height: int, width: int) -> Tensor:
    """Read an image as [3 H W] in [-1, 1]: scaled to cover H x W and cropped around the centre.

    Raises:
        UserError: the file is missing, or is no image that :func:`read_image` reads.
    """
    return fit_image(read_image(source), height, width)


def read_image(source: str | Path | BinaryIO) -> Image.Image:
    """Read an image as 8-bit sRGB.

    EXIF orientation and colour profiles are applied. Transparent parts become white. An animation gives its first
    frame. 16-bit and float images keep their whole range; see :func:`to_8_bit`.

    Raises:
        UserError: the file is missing, damaged, not an image of `FORMATS`, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = decode(source)
    except ImageProblem as problem:
        name = source if isinstance(source, str | os.PathLike) else "the data"
        raise UserError(f"cannot read an image from {name}: {problem}") from problem
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")


def decode(
    source: str | Path | BinaryIO,
    *,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    longest: int | None = None,
) -> Image.Image:
    """Decode an image to upright sRGB, mode RGB or RGBA.

    Args:
        source: a path, or a file open for reading in binary.
        formats: Pillow's names of the accepted formats.
        max_pixels: an image with more is refused before it is decoded.
        longest: shrink the image so that no side has more pixels. This takes less memory than shrinking it later.

    Raises:
        ImageProblem: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about size and metadata: the size is checked here
            Image.init()  # loads all formats; an old Pillow has no AVIF
            with Image.open(source, formats=[name for name in formats if name in Image.OPEN]) as file:
                _check_size(file, max_pixels)
                if longest is not None:
                    file.draft("RGB", (longest, longest))
                return _decoded(file, longest)
    except ImageProblem:
        raise
    except Image.DecompressionBombError:
        raise ImageProblem(_too_many(max_pixels)) from None
    except Exception as error:  # Pillow's decoders can raise any exception
        raise ImageProblem(_explain(source, error)) from error


def _check_size(file: Image.Image, max_pixels: int) -> None:
    if file.width * file.height > max_pixels:
        raise ImageProblem(f"{file.width}x{file.height}: {_too_many(max_pixels)}")


def _too_many(max_pixels: int) -> str:
    return f"it has more than {max_pixels:,} pixels; make it smaller first"


def _decoded(file: Image.Image, longest: int | None) -> Image.Image:
    file.load()
    image = to_8_bit(file)
    if longest is not None and max(image.size) > longest:
        image.thumbnail((longest, longest))
    profile = file.info.get("icc_profile")
    image = _to_srgb(image, profile)
    orientation = file.getexif().get(0x0112, 1)
    if orientation != 1:
        image.getexif()[0x0112] = orientation
        image = ImageOps.exif_transpose(image)
    return image


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale values of 16 or 32 bits or float to 8 bits; other images pass unchanged.

    Integers up to 65535 are taken as 16 bits, larger ones as 32 bits. Float values up to 1 are taken as fractions of
    white, those up to 255 as 8 bits and those up to 65535 as 16 bits. Values below 0, and NaN, are black.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=np.finfo(np.float32).max, neginf=0.0)
    most = values.max()
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((white for white in whites if most <= white), most)
    return Image.fromarray(np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return RGB, or RGBA if something may be transparent; a colour profile that fits the image is applied."""
    has_alpha = image.has_transparency_data
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBX"):
        image = image.convert("RGBA" if has_alpha else "RGB")
    if profile and image.mode in ICC_MODES and "transparency" not in image.info:
        try:
            return ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGBA" if image.mode == "RGBA" else "RGB",
            )
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # damaged, or for another kind of image: viewers ignore such a profile
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGBA" if has_alpha else "RGB")


def _explain(source: str | Path | BinaryIO, error: Exception) -> str:
    """Say in one line why an image cannot be read, with the remedy if one is known."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    head = _head(source)
    if head == b"":
        return "the file is empty"
    if head is not None and head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        name = source if isinstance(source, str | os.PathLike) else "photo.heic"
        return f"it is a HEIC image; convert it with: magick '{name}' '{Path(name).with_suffix('.png')}'"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is damaged or is not one of {', '.join(FORMATS)}"
    return (str(error) or type(error).__name__).splitlines()[0]


def _head(source: str | Path | BinaryIO) -> bytes | None:
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                return file.read(12)
        source.seek(0)
        return source.read(12)
    except (OSError, ValueError):
        return None
