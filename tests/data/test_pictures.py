"""Tests of ``captioning/data/pictures.py``."""

import os
import struct
import tempfile
import zlib

import numpy as np
import pytest
from helpers import encoded
from PIL import Image

import datasets
from captioning.data import finding
from captioning.data import pictures as pictures_room


def read_image(data, size=None):
    """The picture that ``datasets.open_image`` opens, as uint8 (height, width, 3)."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return np.array(datasets.open_image(file.name, size))


def test_every_mode_gives_the_colours_that_a_person_sees(picture):
    rgb = Image.fromarray(picture(1))
    grey = rgb.convert("L")
    expected_grey = np.asarray(grey.convert("RGB")).astype(int)
    greys = {
        "L": encoded(grey, "PNG"),
        "LA": encoded(grey.convert("LA"), "PNG"),
        "I;16": encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "I": encoded(Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "TIFF"),
        "I as bytes": encoded(Image.fromarray(np.asarray(grey).astype(np.int32)), "TIFF"),
        "F from 0 to 1": encoded(
            Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF"
        ),
        "F from 0 to 255": encoded(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF"),
    }
    colours = {
        "RGB": encoded(rgb, "PNG"),
        "RGBA": encoded(rgb.convert("RGBA"), "PNG"),
        "CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
        "CMYK, JPEG": encoded(rgb.convert("CMYK"), "JPEG", quality=98),
        "YCbCr": encoded(rgb.convert("YCbCr"), "TIFF"),
        "P": encoded(rgb.quantize(256), "PNG"),
        "PA": encoded(rgb.convert("RGBA").quantize(256), "PNG"),
        "animation": encoded(
            rgb, "GIF", save_all=True, append_images=[Image.new("RGB", rgb.size, "red")] * 2
        ),
    }
    for mode, data in greys.items():
        assert np.abs(read_image(data) - expected_grey).max() <= 1, mode
    for mode, data in colours.items():
        assert np.abs(read_image(data).astype(int) - np.asarray(rgb)).mean() < 9, mode
    bits = read_image(encoded(Image.fromarray(np.eye(9) > 0), "PNG"))
    assert (bits == 255 * np.eye(9)[..., None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_lie_over_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        image = Image.fromarray(np.repeat([[0] * 4 + [1] * 4], 8, 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        data = encoded(image, "PNG", transparency=1)
    else:
        data = encoded(image.quantize(4) if mode == "PA" else image.convert(mode), "PNG")
    result = read_image(data)
    assert (result[:, :4] < 3).all() and (result[:, 4:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_stands_upright_whatever_its_exif_says(orientation, picture):
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Pillow's transpositions that the camera would have applied
    upright = Image.fromarray(picture(2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    assert (read_image(encoded(stored, "PNG", exif=exif)) == picture(2)).all()


def test_big_jpeg_read_small_looks_the_same(picture):
    data = encoded(Image.fromarray(picture(3, 1600, 1200)), "JPEG", quality=90)
    small, full = read_image(data, size=64), read_image(data)
    assert full.shape == (1200, 1600, 3) and 128 <= min(small.shape[:2]) < 400
    difference = datasets.resize_image(small, 64).astype(int) - datasets.resize_image(full, 64)
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize("width, height", [(1, 1), (2000, 3), (3, 2000), (64, 64)])
def test_resizing_shows_the_whole_picture(width, height):
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    resized = datasets.resize_image(ramp, 32)
    assert resized.shape == (3, 32, 32) and resized.dtype == np.uint8
    if width >= 32:
        assert resized[..., 0].max() < 12 and resized[..., -1].min() > 243


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: b"", "not in a known format; expected a whole JPEG"),
        (lambda: b"<html>", "not in a known format; expected a whole JPEG"),
        (
            lambda: encoded(Image.new("RGB", (99, 99), "red"), "JPEG")[:-300],
            "expected a whole JPEG",
        ),
        (
            lambda: encoded(Image.new("1", (10_000, 10_000)), "PNG"),
            "100,000,000 pixels, too many; expected a whole JPEG.*at most 89,478,485 pixels",
        ),
        (
            lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
            "400000000 pixels.*; expected a whole JPEG",
        ),
    ],
)
def test_an_unreadable_picture_says_why_and_what_to_do(make, reason, tmp_path, fails):
    (tmp_path / "a.jpg").write_bytes(make())
    with fails(f"^cannot read {tmp_path}/a.jpg as a picture: .*{reason}") as caught:
        datasets.open_image(tmp_path / "a.jpg")
    assert "0x" not in str(caught.value)  # no address of one of our objects
    for path in (tmp_path / "none.jpg", tmp_path):
        with fails(f"cannot read {path} as a picture"):
            datasets.open_image(path)


@pytest.mark.parametrize("width, height", [(1, 1), (20_000, 30), (30, 20_000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_pictures_of_any_shape_are_read(width, height, kind):
    square = datasets.resize_image(
        read_image(encoded(Image.new("RGB", (width, height), (250, 0, 0)), kind), 64), 64
    )
    assert (np.abs(square.astype(int) - np.array([250, 0, 0])[:, None, None]) < 8).all()


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "RGBX", "La", "RGBa", "I;16", "I;16B"])
def test_rarer_modes_give_a_picture(mode, tmp_path):
    grey = np.arange(0, 64000, 1000, np.uint16).reshape(8, 8)
    if mode.startswith("I;16"):
        image = Image.fromarray(grey.astype(">u2" if mode == "I;16B" else "<u2"))
    elif mode == "LAB":
        light, neutral = (
            Image.fromarray((grey // 256).astype(np.uint8)),
            Image.new("L", (8, 8), 128),
        )
        image = Image.merge("LAB", [light, neutral, neutral])
    else:
        image = Image.fromarray((grey // 256).astype(np.uint8)).convert(
            "RGBA" if mode in ("La", "RGBa") else "RGB"
        )
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert image.mode == mode
    if mode in ("La", "RGBa"):  # Pillow reads these from TIFF files, but does not write them
        shown = np.asarray(pictures_room._upright_rgb(image))
    else:
        shown = read_image(encoded(image, "TIFF"))
    assert (
        shown.shape == (8, 8, 3)
        and (np.diff(shown.mean(2).ravel()) >= 0).all()
        and np.ptp(shown) > 150
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no named pipes")
def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path, fails):
    os.mkfifo(tmp_path / "a.jpg")
    with fails("a.jpg as a picture: it is no regular file"):
        datasets.open_image(finding.Pictures(tmp_path).find("a.jpg"))


def test_a_jpeg_of_104_megapixels_is_read_at_a_fraction(fails):
    data = encoded(Image.new("L", (11_776, 8_832), 77), "JPEG")
    image = read_image(data, size=224)
    assert image.shape == (1104, 1472, 3) and (image[9, 9] == 77).all()
    with fails("104,005,632 pixels, too many"):
        read_image(data)


def deep_png(values):
    """A PNG of 16 bits, grey (height, width) or RGB (height, width, 3), which Pillow writes not."""
    (height, width), colours = values.shape[:2], values.ndim == 3
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 * colours, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("colours", [False, True])
def test_few_bits_in_sixteen_are_scaled_with_a_note(colours, bits, capsys):
    values = np.linspace(0, 2**bits - 1, 64).round().reshape(8, 8)
    if colours:
        values = values[..., None].repeat(3, 2)
    shown = read_image(deep_png(values)).astype(float)
    assert shown.min() == 0 and shown.max() == 255 and shown.shape == (8, 8, 3)
    expected = np.linspace(0, 255, 64).reshape(8, 8)  # Pillow keeps of colours the upper 8 bits
    assert np.abs(shown - expected[..., None]).max() <= (
        255 / (2 ** (bits - 8) - 1) if colours else 1
    )
    said = capsys.readouterr().err
    assert (f"hold {bits} bits in 16 or more are scaled" in said) == (bits < 16)


def test_heic_is_read_if_the_package_is_there_else_it_is_said_how(tmp_path, fails, monkeypatch):
    path = tmp_path / "a.jpg"  # whatever its name
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0rest")
    monkeypatch.setattr(pictures_room, "learn_heic", lambda: False)
    monkeypatch.setattr(pictures_room.Image, "ID", [])  # the formats that Pillow tries
    with fails("a.jpg as a picture: not in a known format .for HEIC: .* install pillow-heif"):
        datasets.open_image(path)
    monkeypatch.undo()
    pillow_heif = pytest.importorskip("pillow_heif")
    red = Image.new("RGB", (64, 48), "red")
    pillow_heif.from_pillow(red).save(path, quality=90)
    image = datasets.open_image(path)
    assert image.size == (64, 48) and np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() < 9
