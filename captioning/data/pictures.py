"""Picture files: read as a person would see them, and squashed into squares."""

import contextlib
import functools
import importlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import regex
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from captioning.run.messages import UserError, note, why

MAX_PIXELS = 89_478_485  # of a decoded picture: 268 MB as RGB; Pillow warns beyond it
MAX_BYTES = 2**28  # of a file of a picture or a text
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".gif", ".bmp", ".webp", ".avif"}
PICTURE_SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm", ".heic", ".heif"}
HOW_TO_READ_HEIC = "for HEIC: python -m pip install pillow-heif"
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey or of a colour that a camera or a scanner gives


def open_image(path, size=None):
    """Read a picture as a person would see it: of every mode as RGB, rotated as its EXIF says.

    Transparent pixels lie over white, more than 8 bits are scaled, films give one picture.

    :param path: of a file; a ``zipfile.Path`` too
    :param size: side in pixels that the picture will be resized to, if known: a large JPEG is then
        decoded at 1/2, 1/4 or 1/8 of its size, with at least ``2 * size`` pixels along each side
    :return: ``PIL.Image.Image`` of mode RGB
    :raises UserError: if it is missing, empty, truncated, no picture, or of too many pixels
    """
    try:
        data = read_bytes(path)
        if is_heic := bool(regex.match(rb".{4}ftyp(he|mif1|msf1)", data, regex.DOTALL)):
            learn_heic()
        # Image.open refuses 179 million pixels before it is known how many of a JPEG are decoded
        opened = JpegImageFile if data.startswith(b"\xff\xd8\xff") else Image.open
        with opened(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            if image.width * image.height > MAX_PIXELS or pixels > 4 * MAX_PIXELS:
                raise UserError(f"it has {pixels:,} pixels, too many")
            is_deep = image.mode == "RGB" and ";16" in str(image.tile)
            image.load()
            rgb = _upright_rgb(image)
            # of colours in 16 bits Pillow keeps the upper 8, of which cameras may use a few
            return Image.fromarray(_scaled(np.asarray(rgb), 8)) if is_deep else rgb
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged data
        # the text of the first kind holds an address in memory
        reason = why(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"not in a known format{f' ({HOW_TO_READ_HEIC})' if is_heic else ''}"
        raise UserError(
            f"cannot read {path} as a picture: {reason}; expected a whole JPEG, PNG, GIF, WebP"
            f" or TIFF file of at most {MAX_PIXELS:,} pixels"
        ) from error


def resize_image(image, size):
    """Squash a whole picture into a square, so that an attention map covers all of it.

    :param image: uint8 (height, width, 3), or a ``PIL.Image.Image`` of mode RGB
    :param size: side in pixels
    :return: uint8 (3, size, size), antialiased
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))  # (size, size, 3)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))  # (3, size, size)


def square_of(picture, size):
    """A picture as a person has it, as a model sees it.

    :param picture: path, PIL image of any mode, or array of uint8: (height, width), with 1, 3 or 4
        channels last, or RGB with the channels first, as a data set's
    :return: uint8 (3, size, size)
    :raises UserError: if it is none, or cannot be read
    """
    if isinstance(picture, (str, os.PathLike)):
        return resize_image(open_image(picture, size), size)
    expected = "expected a path, a PIL image, or an array of uint8 (height, width, 3)"
    if not isinstance(picture, Image.Image):
        try:
            picture = np.asarray(picture)
        except (TypeError, RuntimeError) as error:  # such as a tensor on a GPU
            raise UserError(f"{type(picture).__name__}: {why(error)}; {expected}") from error
        if picture.ndim == 3 and picture.shape[0] == 3 and picture.shape[2] not in (3, 4):
            picture = picture.transpose(1, 2, 0)  # (height, width, 3)
        if (
            picture.dtype != np.uint8
            or picture.size == 0
            or picture.ndim not in (2, 3)
            or picture.shape[2:] not in ((), (1,), (3,), (4,))
        ):
            kind = f"an array of {picture.dtype}, {picture.shape}"
            raise UserError(f"{kind if picture.ndim else 'no picture'}: {expected}")
        flat = picture.shape[2:] == (1,)
        picture = Image.fromarray(picture[..., 0] if flat else np.ascontiguousarray(picture))
    try:
        return resize_image(_upright_rgb(picture), size)
    except OSError as error:
        raise UserError(f"cannot read the picture: {why(error)}; {expected}") from error


def read_bytes(path):
    """The content of a file, or of a member of a zip archive."""
    packed = isinstance(path, zipfile.Path)
    path = path if packed else Path(path)
    size = path.root.getinfo(path.at).file_size if packed else path.stat().st_size
    if size > MAX_BYTES or not path.is_file():  # a named pipe would be waited for, for ever
        raise UserError(f"it is no regular file of at most {MAX_BYTES:,} bytes")
    return path.read_bytes()


@functools.cache
def learn_heic():
    """Teach Pillow to read HEIC, if the package pillow-heif is there; return whether it is."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _upright_rgb(image):
    """A picture of any mode as RGB, turned as its EXIF says."""
    with contextlib.suppress(Exception):  # the picture is sound even if its EXIF is not
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, whole or float
        values = np.nan_to_num(np.asarray(image), posinf=0).clip(0)
        if not image.mode.startswith("I;16") and (values.max() <= 1 or values.max() >= 2**16):
            values = values * (65535 / max(values.max(), 1))
        return Image.fromarray(_scaled(values)).convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(values, lost=0):
    """Values from 0 to the most that the usual number of bits holds which they need, as uint8.

    :param values: of 16 bits, or whole numbers without ``lost`` of the lower ones
    """
    bits = next(bits for bits in DEPTHS if values.max() < 2 ** max(bits - lost, 1))
    if bits < 16 and values.dtype.kind != "f":
        note(f"pictures that hold {bits} bits in 16 or more are scaled to full brightness")
    return np.rint(values * (255 / (2 ** max(bits - lost, 1) - 1))).astype(np.uint8)
