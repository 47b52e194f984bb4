"""Words, pictures, sources, scenes and the HDF5 files."""

import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import h5py
import numpy as np
import pytest
import torch
from conftest import make_picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import datasets
import eval as evaluation
from datasets import END, PAD, START, UNK, CaptionDataset, Record
from utils import UserError

REAL_FLICKR8K = Path(__file__).parents[2] / "shared" / "flickr8k"


def read_image(data, size=None):
    """The picture that ``datasets.open_image`` opens, as uint8 (height, width, 3)."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return np.array(datasets.open_image(file.name, size))


# -------------------------------------------------------------------------------------------- words


@given(st.text(max_size=60))
@example("Straße_und CAFÉ's ①②\u0301 नमस्ते 漢字 İ ǅ")
def test_tokens_are_words_and_splitting_again_changes_nothing(text):
    tokens = datasets.tokenize(text)
    assert datasets.tokenize(" ".join(tokens)) == tokens
    assert not any(mark in token for token in tokens for mark in " .,_-'<>\n")


@given(st.lists(st.sampled_from(["a", "dog", "runs", "on", "the", "grass", "zebra"]), max_size=12))
def test_decoding_undoes_encoding_up_to_unknown_words(tokens):
    words = [PAD, "a", "dog", "runs", "on", "the", "grass", UNK, START, END]
    word_map = {word: i for i, word in enumerate(words)}
    ids = datasets.encode_caption(tokens, word_map, 12)
    assert len(ids) == 14 and ids.count(word_map[END]) == 1
    assert datasets.decode_caption(ids, words) == [
        token if token in word_map else UNK for token in tokens
    ]


@given(st.lists(st.lists(st.text("abc", min_size=1, max_size=2))), st.integers(1, 4))
def test_word_map_holds_frequent_words_in_the_tutorials_order(token_lists, min_word_freq):
    word_map = datasets.build_word_map(token_lists, min_word_freq)
    counts = Counter(word for tokens in token_lists for word in tokens)
    words = list(word_map)
    assert [word_map[word] for word in words] == list(range(len(words)))
    assert (words[0], words[-3:]) == (PAD, [UNK, START, END])
    assert set(words[1:-3]) == {word for word, count in counts.items() if count >= min_word_freq}
    assert words[1:-3] == sorted(words[1:-3], key=lambda word: (-counts[word], word))


@pytest.mark.parametrize(
    "value",
    [
        [],
        5,
        {},
        {"a": 0},
        {PAD: 0, UNK: 1, START: 2},
        {PAD: 1, UNK: 0, START: 2, END: 3},
        {PAD: 0, UNK: 1, START: 1, END: 2},
        {PAD: 0, UNK: 1, START: 2, END: 4},
        {PAD: 0, UNK: 1, START: 2, END: "3"},
        {PAD: False, UNK: True, START: 2, END: 3},
    ],
)
def test_what_is_no_word_map_is_refused(value, write_bad_json, fails):
    with fails("is no word map"):
        datasets.load_word_map(write_bad_json(value))


def test_word_map_digest_sees_content_and_not_order(word_map):
    digest = datasets.word_map_digest(word_map)
    assert digest == datasets.word_map_digest(dict(reversed(word_map.items())))
    assert digest != datasets.word_map_digest({**word_map, "dog": 1, "a": 2})


@pytest.mark.skipif(not REAL_FLICKR8K.is_dir(), reason="needs Flickr8k's captions")
def test_vocabulary_of_flickr8k():
    records, notes = datasets.flickr8k_records(REAL_FLICKR8K)
    assert [sum(r.split == split for r in records) for split in datasets.SPLITS] == [
        6000,
        1000,
        1000,
    ] and not notes
    captions = [text for r in records if r.split == "train" for text in r.captions]
    counts = Counter(word for text in captions for word in datasets.tokenize(text))
    assert (len(counts), sum(count >= 5 for count in counts.values())) == (7370, 2535)


# ----------------------------------------------------------------------------------------- pictures


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
        shown = np.asarray(datasets._to_rgb(image))
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
        datasets.open_image(datasets._Pictures(tmp_path).find("a.jpg"))


# ------------------------------------------------------------------------------------------ sources


def make_flickr8k(folder, pictures=10, line_end="\n"):
    """A miniature of Flickr8k's two archives, with macOS's extra members and an odd caption."""
    names = [f"{i:02d}_ab.jpg" for i in range(pictures)]
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(names):
            archive.writestr(
                f"Flicker8k_Dataset/{name}", encoded(Image.fromarray(make_picture(i)), "JPEG")
            )
            archive.writestr(f"__MACOSX/Flicker8k_Dataset/._{name}", b"resource fork")
    captions = [f"{name}#{k}\tA dog {k} runs on the grass ." for name in names for k in range(5)]
    texts = {
        "Flickr8k.token.txt": [*captions, "00_ab.jpg.1#0\tpeople waiting"],
        "Flickr_8k.trainImages.txt": names[:6],
        "Flickr_8k.devImages.txt": names[6:8],
        "Flickr_8k.testImages.txt": names[8:],
    }
    with zipfile.ZipFile(folder / "Flickr8k_text.zip", "w") as archive:
        for name, lines in texts.items():
            archive.writestr(name, line_end.join([*lines, ""]))
            archive.writestr(f"__MACOSX/._{name}", b"resource fork")
    return folder


def contents(records):
    return [(r.name, r.split, r.captions, np.array(r.image(32)).tobytes()) for r in records]


def test_flickr8k_is_the_same_packed_and_unpacked(tmp_path):
    packed = make_flickr8k(tmp_path / "packed")
    crlf = make_flickr8k(tmp_path / "crlf", line_end="\r\n")
    unpacked = tmp_path / "unpacked"
    for archive in packed.iterdir():
        shutil.unpack_archive(archive, unpacked)
    expected = contents(datasets.flickr8k_records(packed)[0])
    assert Counter(split for _, split, _, _ in expected) == {"train": 6, "val": 2, "test": 2}
    assert all(len(captions) == 5 for _, _, captions, _ in expected)
    assert contents(datasets.flickr8k_records(unpacked)[0]) == expected
    assert contents(datasets.flickr8k_records(crlf)[0]) == expected


def test_flickr8k_that_is_not_whole_is_refused(tmp_path, fails):
    folder = make_flickr8k(tmp_path / "data")
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip") as archive:
        members = archive.infolist()[:10]
        contents = {member.filename: archive.read(member) for member in members}
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with fails("5 of 10 pictures are missing"):
        datasets.flickr8k_records(folder)
    data = (folder / "Flickr8k_text.zip").read_bytes()
    (folder / "Flickr8k_text.zip").write_bytes(data[: len(data) // 2])
    with fails("Flickr8k_text.zip is not a whole zip archive"):
        datasets.flickr8k_records(folder)
    (folder / "Flickr8k_text.zip").unlink()
    with fails("is not the whole of Flickr8k: expected Flickr8k_Dataset.zip and Flickr8k_text.zip"):
        datasets.flickr8k_records(folder)


def test_member_that_claims_an_absurd_size_is_not_read(tmp_path, fails, monkeypatch):
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(5001))
    monkeypatch.setattr(datasets, "MAX_BYTES", 5000)
    with fails("a.jpg as a picture: it is no regular file of at most 5,000 bytes"):
        datasets.open_image(datasets._Pictures(path).find("a.jpg"))


@pytest.mark.parametrize(
    "name", ["../../climbs.jpg", "/climbs.jpg", "..\\climbs.jpg", "C:\\climbs.jpg"]
)
def test_archives_that_climb_out_are_read_in_place(name, tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "pictures.zip", "w") as archive:
        archive.writestr(name, encoded(Image.new("RGB", (9, 9), "red"), "PNG"))
    pictures = datasets._Pictures(tmp_path / "in" / "pictures.zip")
    assert datasets.open_image(pictures.find(name)).size == (9, 9)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "pictures.zip"]


def test_a_link_in_an_archive_is_not_followed(tmp_path, fails):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        link = zipfile.ZipInfo("a.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret.png"))
    with fails("pictures.zip/a.jpg as a picture: not in a known format"):
        datasets.open_image(datasets._Pictures(tmp_path / "pictures.zip").find("a.jpg"))


def test_members_with_a_wrong_checksum_or_an_unknown_compression_are_refused(tmp_path, fails):
    path = tmp_path / "pictures.zip"
    picture = encoded(Image.new("RGB", (99, 99), "red"), "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", picture)
    whole = path.read_bytes()
    start = whole.index(picture)
    path.write_bytes(whole[: start + 80] + bytes([whole[start + 80] ^ 1]) + whole[start + 81 :])
    with fails("cannot read .*pictures.zip/a.jpg as a picture: Bad CRC-32"):
        datasets.open_image(datasets._Pictures(path).find("a.jpg"))
    entry = whole.rindex(b"PK\x01\x02")
    path.write_bytes(whole[: entry + 10] + b"\x63" + whole[entry + 11 :])
    with fails("cannot read .*pictures.zip/a.jpg as a picture: .*compression"):
        datasets.open_image(datasets._Pictures(path).find("a.jpg"))
    for data in (b"", b"<html>", whole[:-30]):
        path.write_bytes(data)
        with fails("pictures.zip is not a whole zip archive"):
            datasets._Pictures(path)


def test_karpathys_files(tmp_path, own_data, fails):
    folder, _ = own_data
    (folder / "val2014").mkdir()
    (folder / "01.jpg").rename(folder / "val2014" / "01.jpg")
    entries = [
        {
            "filename": "00.jpg",
            "split": "train",
            "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}],
        },
        {
            "filename": "01.jpg",
            "filepath": "val2014",
            "split": "restval",
            "sentences": [{"tokens": ["a", "cat"]}],
        },
        {"filename": "02.jpg", "split": "test", "sentences": []},
        {"filename": "03.jpg", "split": "val", "sentences": [{"raw": "It runs."}], "cocoid": 3},
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    records, notes = datasets.custom_records(folder, path, 0)
    assert [(r.name, r.split, r.captions) for r in records] == [
        ("00.jpg", "train", ["A dog."]),
        ("val2014/01.jpg", "train", ["a cat"]),
        ("03.jpg", "val", ["It runs."]),
    ]
    assert np.array_equal(records[1].image(32), Image.open(folder / "val2014" / "01.jpg"))
    assert [record.image_id for record in records] == [None, None, 3]
    assert sum("1 pictures have no caption" in note for note in notes) == 1
    for value in ([], {"images": []}, {"images": 5}):
        path.write_text(json.dumps(value))
        with fails("dataset.json"):
            datasets.custom_records(folder, path, 0)
    good = entries[0]
    for broken in (
        5,
        {},
        {**good, "split": "extra"},
        {**good, "sentences": [5]},
        {**good, "split": [1]},
    ):
        path.write_text(json.dumps({"images": [entries[0], broken]}))
        with fails("image 2: (malformed|unknown split)"):
            datasets.custom_records(folder, path, 0)


def test_own_captions_are_the_same_in_each_format(tmp_path, own_data):
    folder, csv_file = own_data
    expected, notes = datasets.custom_records(folder, csv_file, 0)
    assert len(expected) == 20 and not notes
    assert expected[0].captions == ["A dog runs on grass 0.", "The dog, it runs", "A grass"]
    shutil.make_archive(tmp_path / "pictures", "zip", folder)
    forms = {
        "bom_crlf.csv": "\ufeff" + csv_file.read_text().replace("\n", "\r\n"),
        "rows.jsonl": "\n".join(
            json.dumps({"image": r.name, "caption": c, "split": r.split})
            for r in expected
            for c in r.captions
        ),
        "lists.jsonl": "\r\n\r\n".join(
            json.dumps({"image": r.name, "captions": r.captions, "split": r.split})
            for r in expected
        ),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        for images in (folder, tmp_path / "pictures.zip"):
            assert contents(datasets.custom_records(images, tmp_path / name, 0)[0]) == contents(
                expected
            ), name
    token = tmp_path / "own.token.txt"
    token.write_text(
        "\r\n".join(f"{r.name}#{k}\t{c}" for r in expected for k, c in enumerate(r.captions)),
        newline="",
    )
    records, _ = datasets.custom_records(folder, token, 0)
    assert [(r.name, r.captions) for r in records] == [(r.name, r.captions) for r in expected]


@given(st.sets(st.text(min_size=1, max_size=9), min_size=3), st.integers(0, 9), st.randoms())
def test_missing_splits_are_dealt_fairly_and_whatever_the_order(names, seed, rng):
    names = sorted(names)
    dealt = datasets._deal_splits(dict.fromkeys(names), seed)[0]
    rng.shuffle(names)
    assert datasets._deal_splits(dict.fromkeys(names), seed)[0] == dealt
    counts = Counter(dealt.values())
    assert (
        counts["val"] == counts["test"] == max(1, round(len(names) / 10)) and counts["train"] >= 1
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected .* below the header image,caption"),
        ("picture,text\n00.jpg,a dog\n", "line 1: expected .* below the header image,caption"),
        ("image,caption,x\n00.jpg,a dog,1\n01.jpg,a dog, runs,1\n", "line 3: 4 fields, expected 3"),
        ("caption,image\na dog, running,01.jpg\n", "line 2: 3 fields, expected 2"),
        ("image,caption\n00.jpg\n", "line 2: 1 fields, expected 2"),
        ('image,caption\n00.jpg,"a dog\n', "line 2: not valid CSV"),
        ("image,caption,split\n00.jpg,a dog,trian\n", "line 2: unknown split 'trian'"),
        (
            "image,caption,split\n00.jpg,a,train\n00.jpg,b,val\n",
            "line 3: 00.jpg is in val here, but in train",
        ),
        ("image,caption\n,a dog\n", "line 2: expected a picture's name"),
        ('{"image": "00.jpg", "caption": "a"}\n{"image": "01.jpg"\n', "line 2: not valid JSON"),
        ('{"image": "00.jpg", "caption": 5}\n', "line 1: expected"),
        ('{"image": 5, "captions": ["a"]}\n', "line 1: expected"),
        ("{" + '"a":[' * 100000, "line 1: not valid JSON"),
        ("00.jpg#0\ta dog\n01.jpg a dog\n", "line 2: expected name.jpg#0<TAB>caption"),
        ("image,caption\n", "holds no caption"),
        ('[{"image": "00.jpg", "caption": 5}]', "entry 1: expected"),
        ('{"image": "00.jpg", "caption": "a", "split": [1]}', "line 1: unknown split"),
        (
            "image_name| comment_number| comment\n00.jpg| 0\n00.jpg| 0\n",
            "line 3: 2 fields, expected 3",
        ),
        ('{"images": [], "annotations": [{"caption": "a"}]}', "captions.csv"),
        ('{"image": "00.jpg", "caption": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("image,caption\n00.jpg," + "a" * 200_000 + "\n", "line 2: not valid CSV"),
        ("image;caption\n00.jpg;a dog\n", "line 1: expected .* below the header image,caption"),
        ("image,caption\nnone.jpg,a dog\n", "1 of 1 pictures are missing"),
        ("image,caption\n../captions.csv,a dog\n", "1 of 1 pictures are missing"),
        ("image,caption\n00.jpg,a dog\n./00.jpg,a dog\n", "both '00.jpg' and './00.jpg'"),
    ],
)
def test_malformed_captions_are_named_with_their_line(text, message, own_data, fails):
    folder, path = own_data
    path.write_text(text)
    with fails(message):
        datasets.custom_records(folder, path, 0)


def test_captions_that_are_not_utf8_are_named_with_their_line(own_data, fails):
    folder, path = own_data
    path.write_bytes("image,caption\n00.jpg,a dog\n01.jpg,ein Tür\n".encode("latin-1"))
    with fails("line 3: not UTF-8"):
        datasets.custom_records(folder, path, 0)


def test_pictures_and_captions_without_each_other_are_said(own_data):
    folder, path = own_data
    with open(path, "a") as file:
        file.write("ghost.jpg,nobody,train\n00.jpg,A grass,train\n")
    Image.new("RGB", (9, 9)).save(folder / "unused.png")
    (folder / "readme.txt").write_text("not a picture")
    records, notes = datasets.custom_records(folder, path, 0)
    assert len(records) == 20 and records[0].captions.count("A grass") == 1
    expected = ("'ghost.jpg' is missing", "1 rows of", "1 pictures of")
    assert len(notes) == 3 and all(words in note for words, note in zip(expected, notes))


# ------------------------------------------------------------------------------------------- shapes


def test_scenes_are_told_truly():
    records, _ = datasets.shapes_records(150, 1, 1, seed=3, size=64)
    assert {len(r.scene["objects"]) for r in records} == {1, 2, 3}
    for record in records:
        assert len(record.captions) == 5
        for caption in record.captions:
            words = caption.split()
            relation = True if len(record.scene["objects"]) > 1 else None
            assert evaluation.judge_caption(record.scene, words) == {
                "count": True,
                "shapes": True,
                "objects": True,
                "relation": relation,
            }, caption
        boxes = np.array([thing["box"] for thing in record.scene["objects"]])
        assert (boxes >= 0).all() and (boxes <= 1).all()


def test_judge_sees_wrong_objects_and_wrong_relations():
    scene = {
        "objects": [
            {"color": "red", "shape": "circle", "box": [0.1, 0.1, 0.3, 0.3]},
            {"color": "blue", "shape": "star", "box": [0.6, 0.12, 0.8, 0.32]},
        ]
    }
    for caption, count, shapes, objects, relation in (
        ("a red circle to the left of a large blue star", True, True, True, True),
        ("a blue star left of a red circle", True, True, True, False),
        (
            "a blue star below a red circle",
            True,
            True,
            True,
            False,
        ),  # by less than 5 % of the picture
        ("a red circle and a blue star", True, True, True, None),
        ("a red circle on the left", False, False, False, None),
        ("a red star left of a blue circle", True, True, False, False),
        ("a red circle left of a blue star and a red circle", False, False, False, True),
        ("a red circle and a blue circle", True, False, False, None),
        ("a circle left of a blue star", True, True, False, False),
        ("", False, False, False, None),
    ):
        assert evaluation.judge_caption(scene, caption.split()) == {
            "count": count,
            "shapes": shapes,
            "objects": objects,
            "relation": relation,
        }, caption


def test_pointing_hits_what_a_word_names_and_chance_is_what_blind_pointing_gets():
    records, _ = datasets.shapes_records(60, 0, 0, seed=4, size=64)
    rng, side = np.random.default_rng(0), 8
    blind, named = [], 0
    for record in records:
        words = record.captions[0].split()
        sharp = np.zeros((len(words), side * side))
        for alpha, word in zip(sharp, words):
            named_by = (t for t in record.scene["objects"] if word in (t["color"], t["shape"]))
            for x0, y0, x1, y1 in (thing["box"] for thing in itertools.islice(named_by, 1)):
                alpha[int((y0 + y1) / 2 * side) * side + int((x0 + x1) / 2 * side)] = 1
        scores = evaluation.pointing(record.scene, words, sharp)
        named += sum(word in datasets.SHAPE_COLORS or word in datasets.SHAPES for word in words)
        assert all(hit and 0 < chance < 1 for hit, chance in scores)
        for _ in range(30):
            blind += evaluation.pointing(record.scene, words, rng.random(sharp.shape))
    assert named * 30 == len(blind)
    hits, chances = np.array(blind).mean(0)
    assert abs(hits - chances) < 0.02


def test_boxes_are_where_the_colours_are():
    records, _ = datasets.shapes_records(40, 0, 0, seed=5, size=96)
    for record in records:
        image = np.array(record.image(96)).astype(int)
        for thing in record.scene["objects"][-1:]:  # the last is drawn over the others
            near = np.abs(image - datasets.SHAPE_COLORS[thing["color"]]).max(2) <= 10
            if sum(other["color"] == thing["color"] for other in record.scene["objects"]) == 1:
                ys, xs = np.nonzero(near)
                seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 96
                assert np.abs(seen - thing["box"]).max() < 0.04, record


def test_a_generated_picture_depends_on_seed_split_and_number_alone():
    few = contents(datasets.shapes_records(3, 2, 2, seed=6, size=32)[0])
    many = {
        entry[0]: entry for entry in contents(datasets.shapes_records(8, 4, 5, seed=6, size=32)[0])
    }
    assert few == [many[entry[0]] for entry in few]
    assert few != contents(datasets.shapes_records(3, 2, 2, seed=7, size=32)[0])
    assert len({pixels for *_, pixels in many.values()}) == len(many)


# --------------------------------------------------------------------------------------------- HDF5


def record(i, split="train", captions=("a dog runs",), image=None):
    return Record(f"{i}.jpg", split, list(captions), image or (lambda size: make_picture(i)))


def write(folder, records, **options):
    options = {"min_word_freq": 1, "max_len": 6, "image_size": 32, **options}
    summaries, word_map = datasets.write_dataset(
        folder, records, dataset="mine", source="test", **options
    )
    name = datasets.base_name(
        "mine", options.get("captions_per_image", 5), options["min_word_freq"]
    )
    return (
        [CaptionDataset(datasets.split_path(folder, split, name)) for split in datasets.SPLITS],
        summaries,
        word_map,
    )


def everywhere(captions=("a dog runs",), **options):
    """One picture in each split."""
    return [record(i, split, captions, **options) for i, split in enumerate(datasets.SPLITS)]


def test_same_bytes_whatever_the_number_of_threads(tmp_path):
    for folder, workers in (("one", 1), ("eight", 8)):
        records, _ = datasets.shapes_records(40, 3, 3, seed=1, size=32)
        write(tmp_path / folder, records, workers=workers, max_len=20, captions_per_image=3)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "eight" / name).read_bytes(), (
            name
        )


def test_file_gives_back_what_was_written(shapes_train, shapes_word_map):
    records, _ = datasets.shapes_records(24, 0, 0, seed=1, size=64)
    words = list(shapes_word_map)
    assert shapes_train.image_names == [r.name for r in records] and len(shapes_train) == 24
    assert shapes_train.scenes == [r.scene for r in records]
    assert shapes_train.raw_references == [r.captions for r in records]
    for i, r in enumerate(records):
        rows = range(*shapes_train.caption_offsets[i : i + 2])
        decoded = [datasets.decode_caption(shapes_train.captions[row], words) for row in rows]
        assert decoded == shapes_train.references[i] == [text.split() for text in r.captions]
        assert [len(tokens) + 2 for tokens in decoded] == shapes_train.caption_lengths[
            list(rows)
        ].tolist()
        assert (shapes_train.images([i])[0] == datasets.resize_image(r.image(64), 64)).all()
    shapes_train.check_word_map(shapes_word_map)


@given(st.lists(st.integers(-24, 23), max_size=8))
@settings(max_examples=40)
def test_pictures_come_in_the_order_asked_for(opened, indices):
    everything = opened.images(slice(None))
    assert (opened.images(indices) == everything[np.array(indices, int)]).all()
    assert (opened.images(slice(2, 20, 3)) == everything[2:20:3]).all()


@pytest.fixture(scope="module")
def opened(shapes_data):
    return CaptionDataset(datasets.split_path(shapes_data[0], "train", shapes_data[1]))


def _checksum(dataset, i):
    return i, dataset.images([i, (i * 7) % 24]).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_read_one_file(method, shapes_train):
    expected = [
        _checksum(shapes_train, i % 24) for i in range(96)
    ]  # and so it is open when the others are made
    with multiprocessing.get_context(method).Pool(2) as pool:
        got = pool.starmap(_checksum, [(shapes_train, i % 24) for i in range(96)], chunksize=3)
    assert got == expected
    assert _checksum(pickle.loads(pickle.dumps(shapes_train)), 5) == expected[5]


def _read_inherited(queue):
    queue.put([_checksum(_inherited, i) for i in range(24)])


_inherited = None


def test_reader_that_a_fork_inherits_while_open(shapes_train):
    global _inherited
    _inherited = shapes_train
    expected = [_checksum(shapes_train, i) for i in range(24)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_inherited, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    assert [_checksum(shapes_train, i) for i in range(24)] == expected
    assert [queue.get(timeout=30) for _ in children] == [expected] * 3
    for child in children:
        child.join()
    assert [_checksum(shapes_train, i) for i in range(24)] == expected


def test_vocabulary_comes_from_the_training_split_alone(tmp_path):
    records = [record(0), record(1, "val", ["a cat cat"]), record(2, "test", ["a zebra"])]
    (train, val, _), summaries, word_map = write(tmp_path, records)
    assert set(word_map) == {"a", "dog", "runs", PAD, UNK, START, END}
    assert (summaries["val"]["words"], summaries["val"]["unknown"]) == (3, 2)
    assert val.references == [[["a", "cat", "cat"]]]
    assert train.word_map_digest == datasets.word_map_digest(word_map)


def test_captions_are_drawn_and_never_doubled(tmp_path):
    texts = [f"a dog {word}" for word in "abcdefgh"]
    records = [*everywhere(), record(7, captions=texts), record(8, captions=["a dog", "dog"])]
    chosen = set()
    for seed in range(4):
        (train, _, _), _, word_map = write(
            tmp_path / str(seed), records, captions_per_image=3, seed=seed
        )
        rows = [
            [
                " ".join(datasets.decode_caption(row, list(word_map)))
                for row in train.captions[start:stop]
            ]
            for start, stop in zip(train.caption_offsets, train.caption_offsets[1:])
        ]
        assert rows[0] == ["a dog runs"] and rows[2] == ["a dog", "dog"]
        assert len(rows[1]) == 3 and set(rows[1]) <= set(texts) and rows[1] == sorted(set(rows[1]))
        assert train.raw_references[1] == texts
        chosen.add(tuple(rows[1]))
    assert len(chosen) > 1


def test_odd_captions_are_left_out_and_counted(tmp_path):
    long, odd = " ".join(["dog"] * 500), ["!?", "", "a\tdog\x00runs\n\ud800", "собака бежит"]
    records = [
        *everywhere(odd),
        record(3, captions=[long, "a dog"]),
        record(4, captions=[long]),
        record(5, captions=["--"]),
        record(6, "val", [long]),
    ]
    (train, val, _), summaries, word_map = write(tmp_path, records)
    assert train.image_names == ["0.jpg", "3.jpg"] and val.image_names == ["1.jpg", "6.jpg"]
    assert train.raw_references == [["a dog runs", "собака бежит"], [long, "a dog"]]
    assert val.caption_offsets.tolist() == [0, 2, 2] and val.references[1] == [["dog"] * 500]
    assert "собака" in word_map
    assert {key: summaries["train"][key] for key in ("empty", "too_long", "without_captions")} == {
        "empty": 3,
        "too_long": 2,
        "without_captions": 2,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_are_written(tmp_path):
    odd = [
        Record(
            f"caf\udce9\n{i}.jpg",
            split,
            [f"a dog {k}" for k in range(9)],
            lambda size: make_picture(0),
        )
        for i, split in enumerate(datasets.SPLITS)
    ]
    (train, _, _), _, _ = write(tmp_path, odd)
    assert train.image_names == ["caf?\n0.jpg"] and len(train.captions) == 5


def broken(size):
    raise UserError("cannot read the picture")


def test_unreadable_picture_is_named_and_left_out(tmp_path):
    records = everywhere()
    records += [
        record(i, captions=[f"number {i}"], image=broken if i == 30 else None) for i in range(3, 60)
    ]
    (train, _, _), summaries, _ = write(tmp_path, records)
    assert summaries["train"]["unreadable"] == ["cannot read the picture"]
    assert "30.jpg" not in train.image_names and len(train) == 57
    for i, name in enumerate(train.image_names):
        number = int(name.split(".")[0])
        assert (train.images([i])[0] == datasets.resize_image(make_picture(number), 32)).all()
        assert number == 0 or train.raw_references[i] == [f"number {number}"]


def interrupt(size):
    raise KeyboardInterrupt


@pytest.mark.parametrize("image, error", [(broken, UserError), (interrupt, KeyboardInterrupt)])
def test_nothing_is_left_after_a_failure(image, error, tmp_path):
    (tmp_path / "mine").write_text("other file")
    with pytest.raises(error):
        write(tmp_path, [*everywhere(), *(record(i, "test", image=image) for i in range(3, 9))])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("room", [500, 3_000, 150_000])
def test_full_disk_ends_in_one_line_and_leaves_nothing(room, tmp_path):
    program = f"""
import resource, signal, sys, datasets, utils
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
records, _ = datasets.shapes_records(60, 6, 6, size=32)
try:
    datasets.write_dataset(sys.argv[1], records, dataset="shapes", source="x", image_size=32)
except utils.UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=Path(datasets.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        result.stdout.count("\n") == 1
        and "cannot write" in result.stdout
        and "TRAIN_" in result.stdout
    )
    assert not list(tmp_path.iterdir())


def test_data_set_that_cannot_be_trained_on_is_refused(tmp_path, fails):
    with fails("mine has no pictures in its test split"):
        write(tmp_path, everywhere()[:2])
    with fails("lower --min_word_freq"):
        write(tmp_path, everywhere(), min_word_freq=4)
    with fails("check the captions and --max_len"):
        write(tmp_path, everywhere(), max_len=2)


def test_other_word_map_is_refused(shapes_train, word_map, fails):
    with fails("encoded with another word map"):
        shapes_train.check_word_map(word_map)


def test_what_is_no_file_of_ours_is_refused(shapes_data, tmp_path, fails):
    whole = datasets.split_path(shapes_data[0], "val", shapes_data[1]).read_bytes()
    path = tmp_path / "VAL.hdf5"
    with fails(f"there is no {tmp_path}.*--data_folder, or make it with create_input_files.py"):
        CaptionDataset(path)
    for data in (b"", b"text" * 999, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with fails("VAL.hdf5 cannot be used"):
            CaptionDataset(path)
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(5)
    with fails("another format"):
        CaptionDataset(path)


def test_hdf5_that_is_still_being_written_is_refused(shapes_data, tmp_path, fails):
    path = tmp_path / "TRAIN.hdf5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file["images"] = np.zeros((5, 3, 32, 32), np.uint8)
        file.flush()
        with fails("TRAIN.hdf5 cannot be used.*--force"):
            CaptionDataset(path)
        shutil.copy(path, tmp_path / "copy.hdf5")
    with fails("copy.hdf5 cannot be used"):
        CaptionDataset(tmp_path / "copy.hdf5")


def packed(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    "name, value",
    [
        ("image_names", packed([5] * 6)),
        ("image_names", packed({})),
        ("image_names", packed(["a"] * 5)),
        ("image_names", np.frombuffer(b'["\xff"]', np.uint8)),
        ("references", packed([[5]] * 6)),
        ("references", packed(["a"] * 6)),
        ("references", packed([])),
        ("scenes", packed([{}] * 6)),
        ("scenes", packed([])),
        (
            "scenes",
            packed([{"objects": [{"color": "red", "shape": "star", "box": [0, 1]}]}] * 6),
        ),
        ("scenes", packed([{"objects": ["red"]}] * 6)),
        ("captions", np.full((30, 22), -1, np.int32)),
        ("captions", np.zeros((30, 21), np.int32)),
        ("captions", np.zeros((30, 22), np.int64)),
        ("captions", np.full((30, 22), 10**6, np.int32)),
        ("caption_lengths", np.full(30, 23)),
        ("caption_lengths", np.full(30, 2)),
        ("caption_offsets", np.arange(7)[::-1] * 5),
        ("caption_offsets", np.arange(7)),
        ("images", np.zeros((6, 3, 32, 32), np.uint8)),
        ("images", np.zeros((5, 3, 64, 64), np.uint8)),
        ("images", np.zeros((6, 3, 64, 64), np.float32)),
    ],
)
def test_hdf5_of_another_layout_is_refused(
    name, value, shapes_data, shapes_word_map, tmp_path, fails
):
    path = tmp_path / "VAL.hdf5"
    shutil.copy(datasets.split_path(shapes_data[0], "val", shapes_data[1]), path)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file[name]
        file[name] = value
    with fails("VAL.hdf5 (cannot be used|was encoded with another word map).*--force"):
        data = CaptionDataset(path)
        data.check_word_map(shapes_word_map)
        assert data.references and data.scenes


def test_attributes_that_are_missing_are_refused(shapes_data, tmp_path, fails):
    for key in ("split", "name", "image_size", "max_len", "word_map_digest"):
        path = tmp_path / "VAL.hdf5"
        shutil.copy(datasets.split_path(shapes_data[0], "val", shapes_data[1]), path)
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            del file.attrs[key]
        with fails("VAL.hdf5 cannot be used"):
            CaptionDataset(path)


def test_every_file_name_tells_what_it_is():
    name = datasets.base_name("flickr8k", 5, 5)
    assert name == "flickr8k_5_cap_per_img_5_min_word_freq"
    paths = [
        *(datasets.split_path("d", split, name) for split in datasets.SPLITS),
        datasets.word_map_path("d", name),
        datasets.contact_sheet_path("d", name),
        datasets.checkpoint_path("d", name),
        datasets.checkpoint_path("d", name, best=True),
        datasets.log_path("d", name),
        datasets.curves_path("d", name),
        datasets.features_path("d", name, "val", "k"),
        datasets.captions_path("d", name, "val", 3),
        datasets.metrics_path("d", name, "val"),
    ]
    assert len(set(paths)) == len(paths) and {path.parent for path in paths} == {Path("d")}
    assert (
        paths[0].name == f"TRAIN_{name}.hdf5" and paths[6].name == f"BEST_checkpoint_{name}.pth.tar"
    )


def test_reading_data_does_not_import_what_is_slow():
    program = (
        "import sys, datasets, create_input_files; "
        "print({'torch', 'matplotlib', 'skimage'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(datasets.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------ batches


def test_batches_hold_every_picture_once_among_captions_of_similar_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 40, 5 * 403)
    data = MagicMock(
        caption_lengths=lengths,
        caption_offsets=np.arange(0, len(lengths) + 1, 5),
        __len__=lambda _: 403,
    )
    longest = lengths.reshape(-1, 5).max(1)
    batches = datasets.training_batches(data, 8, seed=0, epoch=3)
    assert sorted(np.concatenate(batches)) == list(range(403))
    assert sorted(map(len, batches)) == [3, *[8] * 50]
    steps = [longest[batch].max() for batch in batches]
    shuffled = rng.permutation(403)
    assert np.mean(steps) < 0.97 * np.mean(
        [longest[shuffled[i : i + 8]].max() for i in range(0, 403, 8)]
    )
    assert (
        abs(np.corrcoef(steps, np.arange(len(steps)))[0, 1]) < 0.4
    )  # no curriculum from short to long
    again, later, other = (
        datasets.training_batches(data, 8, *which) for which in ((0, 3), (0, 4), (1, 3))
    )
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    for different in (later, other):
        assert not all(np.array_equal(a, b) for a, b in zip(batches, different))


# -------------------------------------------------------------------------- features and embeddings


def test_a_finished_feature_store_needs_no_right_to_write(tmp_path, shapes_train, monkeypatch):
    encode = lambda images: torch.ones(len(images), 4, 3)
    made = datasets.encode_split(shapes_train, encode, tmp_path / "f.npy")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert (datasets.encode_split(shapes_train, None, tmp_path / "f.npy") == made).all()


def test_no_share_has_no_features(shapes_train):
    assert len(datasets.encode_split(shapes_train, None, rows=slice(0, 0))) == 0


def test_words_with_spaces_among_embeddings_are_passed_over(tmp_path, fails):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\n. . . 4 5 6\nat name@domain.com 7 8 9\ncat 0 1 2\n")
    vectors, found = datasets.load_embeddings(path, {"<pad>": 0, "cat": 1, "dog": 2, "at": 3}, 3)
    assert found.tolist() == [False, True, True, False] and vectors[2].tolist() == [1, 2, 3]
    with fails("line 1: 3 values, expected --embed_dim 4"):
        datasets.load_embeddings(path, {"cat": 0}, 4)
    path.write_text("dog 1 2 3\ncat 1 2\n")
    with fails("line 2: 2 values, expected --embed_dim 3"):
        datasets.load_embeddings(path, {"cat": 0}, 3)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_reserve_space_gets_the_same_bytes(code, tmp_path, monkeypatch):
    records, _ = datasets.shapes_records(4, 2, 2, size=32)
    options = {"dataset": "shapes", "source": "x", "image_size": 32, "min_word_freq": 1}
    datasets.write_dataset(tmp_path / "a", records, **options)

    def refuse(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    datasets.write_dataset(tmp_path / "b", records, **options)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    encode = lambda images: torch.ones(len(images), 4, 3)
    data = CaptionDataset(next((tmp_path / "b").glob("TRAIN*")))
    assert (datasets.encode_split(data, encode, tmp_path / "f.npy") == 1).all()


def test_features_of_a_folder_that_may_not_be_written_are_kept_in_memory(
    shapes_train, tmp_path, monkeypatch, capsys
):
    encode = lambda images: images[:, :, :2, 0].float().transpose(1, 2)
    expected = datasets.encode_split(shapes_train, encode)
    monkeypatch.setattr(os, "access", lambda *_: False)
    features = datasets.encode_split(shapes_train, encode, tmp_path / "f.npy", slice(0, 3))
    assert (features == expected).all() and not list(tmp_path.iterdir())
    assert "may not be written: train's features" in capsys.readouterr().err


def test_features_that_were_interrupted_are_continued(shapes_train, tmp_path, capsys):
    path, seen = tmp_path / "f.npy", []

    def encode(images, stop=6):  # the first of them is one picture, which tells the shape
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(len(images))
        return images[:, :, :2, 0].float().transpose(1, 2)

    with pytest.raises(KeyboardInterrupt):
        datasets.encode_split(shapes_train, encode, path, batch_size=4)
    assert not path.exists() and "the next run goes on from there" in capsys.readouterr().err
    assert seen == [1, 4, 4, 4, 4, 4]
    seen.clear()
    features = datasets.encode_split(shapes_train, encode, path, batch_size=4)
    # of the five batches two may have waited to be written when the first run was stopped
    assert 4 <= sum(seen) <= 12 and [p.name for p in tmp_path.iterdir()] == ["f.npy"]
    assert (features == shapes_train.images(range(24))[:, :, :2, 0].transpose(0, 2, 1)).all()


def test_files_written_before_have_no_ids(shapes_train):
    assert shapes_train.image_ids == [None] * 24 and "image_ids" not in h5py.File(shapes_train.path)


# --------------------------------------------------------------------------- data as people have it


def save_pictures(folder, names, start=0):
    for i, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_picture(i)).save(folder / name, "PNG")
    return folder


def shown(record):
    """The number of the picture that a record shows."""
    pixels = np.array(record.image(36))
    return next(i for i in range(99) if np.array_equal(pixels, make_picture(i)))


def write_csv(path, rows):
    path.write_text("".join(f"{','.join(row)}\n" for row in [("image", "caption"), *rows]))
    return path


@pytest.mark.parametrize(
    "on_disk, listed, expected",
    [
        (["day/0.png", "night/0.png"], ["night/0.png", "day/0.png"], [1, 0]),
        (["a/0.png", "b/1.png"], ["x/y/pictures/a/0.png", "1.png"], [0, 1]),
        (["a/0.JPG", "a/1.jpeg"], ["a/0.jpg", "A/1"], [0, 1]),
        (["0", "0.png"], ["0", "0.png"], [0, 1]),
        (["Caf\u00e9.png", "u\u0308.png"], ["Cafe\u0301.png", "\u00fc.png"], [0, 1]),
        (["0.png", "a/0.png"], ["0.png", "./a/0.png"], [0, 1]),
    ],
)
def test_a_picture_is_found_by_the_end_of_its_path(on_disk, listed, expected, tmp_path):
    folder = save_pictures(tmp_path / "pictures", on_disk)
    shutil.make_archive(tmp_path / "pictures", "zip", folder)
    path = write_csv(tmp_path / "c.csv", [(name, "a dog") for name in listed])
    for images in (folder, tmp_path / "pictures.zip"):
        records, _ = datasets.custom_records(images, path, 0)
        assert [shown(record) for record in records] == expected


def test_a_picture_of_another_folder_is_not_taken(tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["night/0.png"])
    for name in ("day/0.png", "0.jpg"):
        with fails(f"1 of 1 pictures are missing in .*'{name}'"):
            datasets.custom_records(folder, write_csv(tmp_path / "c.csv", [(name, "a")]), 0)
    clips = [f"clip{c}/{i}.png" for c in (1, 2) for i in range(20)]
    folder = save_pictures(tmp_path / "clips", clips[:-1])
    rows = [(name, "a dog") for name in clips]
    records, notes = datasets.custom_records(folder, write_csv(tmp_path / "c.csv", rows), 0)
    assert [shown(record) for record in records] == list(range(39))
    assert any("'clip2/19.png' is missing" in note for note in notes)


def test_a_name_that_two_pictures_have_is_an_error_that_names_both(tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["a/0.png", "b/0.png"])
    with fails("'0.png' may be .*/(a|b)/0.png or .*/(a|b)/0.png"):
        datasets.custom_records(folder, write_csv(tmp_path / "c.csv", [("0.png", "a")]), 0)


@pytest.mark.parametrize("suffix", ["tar", "gztar"])
def test_a_tar_archive_is_to_be_unpacked(suffix, tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["0.png"])
    archive = Path(shutil.make_archive(tmp_path / "packed", suffix, folder))
    with fails("a tar archive.*unpack it"):
        datasets.custom_records(archive, write_csv(tmp_path / "c.csv", [("0.png", "a")]), 0)


def test_cocos_own_files_and_their_ids(tmp_path, fails):
    files = []
    for k, split in enumerate(("train2014", "val2014")):  # the same names in both
        save_pictures(tmp_path / "coco" / split, [f"{split}_{i}.jpg" for i in range(4)], 4 * k)
        shutil.make_archive(tmp_path / split, "zip", tmp_path / "coco" / split)
        ids = [100 * k + i for i in range(4)]
        content = {
            "info": {},
            "images": [{"id": n, "file_name": f"{split}_{n % 100}.jpg"} for n in ids],
            "annotations": [
                {"id": 9 * n + k, "image_id": n, "caption": f"A dog {k}."}
                for n in ids
                for k in (0, 1)
            ],
        }
        files.append(tmp_path / f"captions_{split}.json")
        files[-1].write_text(json.dumps(content, indent=1))
    zips = [tmp_path / "train2014.zip", tmp_path / "val2014.zip"]
    for images in (tmp_path / "coco", zips):
        records, notes = datasets.custom_records(images, files, 0)
        assert [shown(record) for record in records] == list(range(8))
        assert [record.image_id for record in records] == [0, 1, 2, 3, 100, 101, 102, 103]
        splits = Counter(record.split for record in records)
        assert splits == {"train": 4, "val": 2, "test": 2} and records[3].split == "train"
        assert records[5].captions == ["A dog 0.", "A dog 1."] and "--seed 0" in notes[0]
    (train, val, test), _, _ = write(tmp_path / "out", records)
    assert train.image_ids == [0, 1, 2, 3] and sorted(val.image_ids + test.image_ids)[0] == 100
    records, _ = datasets.custom_records(tmp_path / "coco", files[0], 0)
    assert Counter(r.split for r in records) == {"train": 2, "val": 1, "test": 1}
    files[0].write_text('{"images": [], "annotations": [{"bbox": []}]}')
    with fails("captions_train2014.json: annotations without image_id and caption"):
        datasets.custom_records(tmp_path / "coco", files[0], 0)


def test_equal_names_in_two_folders_of_karpathys_file(tmp_path):
    folder = save_pictures(tmp_path / "coco", ["train2014/0.png", "val2014/0.png"])
    images = [
        {
            **{"filepath": name, "filename": "0.png", "split": split, "cocoid": i},
            "sentences": [{"raw": "a dog"}],
        }
        for i, (name, split) in enumerate((("train2014", "train"), ("val2014", "val")), 7)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": [*images], "dataset": "coco"}))
    records, _ = datasets.custom_records(folder, tmp_path / "k.json", 0)
    assert [(shown(r), r.image_id) for r in records] == [(0, 7), (1, 8)]


def test_kaggles_flickr8k(tmp_path):
    names = [f"{i}_x.jpg" for i in range(10)]
    folder = tmp_path / "archive"
    save_pictures(folder / "Images", names)
    rows = [(name, f'"A dog , number {k} ."') for name in names for k in range(5)]
    write_csv(folder / "captions.txt", rows)
    records, notes = datasets.flickr8k_records(folder, seed=3)
    assert Counter(r.split for r in records) == {"train": 8, "val": 1, "test": 1}
    assert records[0].captions[2] == "A dog , number 2 ."
    assert any("--seed 3" in n for n in notes) and any("official split" in n for n in notes)
    lists = {"train": names[4:], "dev": names[:2], "test": names[2:4]}
    for place in (folder, tmp_path):  # in the folder or beside it, as files or in the archive
        for part, listed in lists.items():
            (place / f"Flickr_8k.{part}Images.txt").write_text("\n".join(listed))
        records, _ = datasets.flickr8k_records(folder)
        assert [r.split for r in records] == ["train"] * 6 + ["val"] * 2 + ["test"] * 2
        with zipfile.ZipFile(place / "Flickr8k_text.zip", "w") as archive:
            for path in place.glob("Flickr_8k.*"):
                archive.write(path, path.name)
                path.unlink()
        assert [r.name for r in datasets.flickr8k_records(folder)[0]][6:] == names[:4]
        (place / "Flickr8k_text.zip").unlink()


def test_kaggles_flickr30k_with_its_broken_row(tmp_path):
    names = [f"{i}.jpg" for i in range(10)]
    folder = save_pictures(tmp_path / "flickr30k_images", names)
    rows = [f'{name}| {k}| A "dog", {k} .' for name in names for k in range(5)]
    rows[29] = "5.jpg| 4   A dog runs across the grass ."
    header = "image_name| comment_number| comment"
    (folder / "results.csv").write_text("\n".join([header, *rows]))
    records, notes = datasets.custom_records(folder, folder / "results.csv", 0)
    assert [len(r.captions) for r in records] == [5] * 5 + [4] + [5] * 4
    assert records[0].captions[1].strip() == 'A "dog", 1 .'
    assert "line 31: a field is missing; left out: 5.jpg| 4   A dog runs" in notes[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_hugging_faces_image_folders(kind, tmp_path, fails):
    folder, expected = tmp_path / "data", []
    for k, (part, split) in enumerate(
        (("train", "train"), ("validation", "val"), ("test", "test"))
    ):
        save_pictures(folder / part, ["0.png", "1.png"], 2 * k)
        rows = [{"file_name": f"{i}.png", "text": f"a dog, {i}"} for i in (0, 1)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind == "csv":
            text = "file_name,text\n" + "".join('{file_name},"{text}"\n'.format(**r) for r in rows)
        (folder / part / f"metadata.{kind}").write_text(text)
        expected += [(2 * k + i, split, [f"a dog, {i}"]) for i in (0, 1)]
    records, notes = datasets.custom_records(folder, folder, 0)
    assert sorted((shown(r), r.split, r.captions) for r in records) == expected and not notes
    (tmp_path / "none").mkdir()
    with fails("none holds no metadata.csv or .jsonl"):
        datasets.custom_records(folder, tmp_path / "none", 0)


def test_json_arrays_with_one_caption_or_several(tmp_path):
    folder = save_pictures(tmp_path / "p", ["0.png", "1.png", "2.png"])
    entries = [
        {"image": "0.png", "caption": "a dog"},
        {"image": "1.png", "caption": ["a dog", "a cat"], "image_id": 5},
        {"image": "2.png", "caption": "a cat", "split": "test"},
        {"image": "0.png", "caption": "a cat"},
    ]
    (tmp_path / "c.json").write_text(json.dumps(entries, indent=2))
    records, _ = datasets.custom_records(folder, tmp_path / "c.json", 0)
    assert [r.captions for r in records] == [["a dog", "a cat"], ["a dog", "a cat"], ["a cat"]]
    assert [r.image_id for r in records] == [None, 5, None] and records[2].split == "test"


def test_captions_with_commas_and_no_quotes(tmp_path):
    folder = save_pictures(tmp_path / "p", ["0.png", "1.png", "2.png"])
    rows = [("0.png", "a dog", " a cat"), ("1.png", '"a, b"'), ("2.png", "a bird")]
    records, notes = datasets.custom_records(folder, write_csv(tmp_path / "c.csv", rows), 0)
    assert [r.captions for r in records] == [["a dog, a cat"], ["a, b"], ["a bird"]]
    assert notes[0].startswith("1 captions of ") and "was read as the caption" in notes[0]


def test_a_split_that_the_source_lacks_is_dealt_out():
    names = [f"{i}" for i in range(40)]
    for source, expected in (
        ([None] * 40, {"train": 32, "val": 4, "test": 4}),
        (["train"] * 40, {"train": 32, "val": 4, "test": 4}),
        (["train"] * 30 + ["val"] * 10, {"train": 27, "val": 10, "test": 3}),
        (["train"] * 30 + [None] * 10, {"train": 30, "val": 5, "test": 5}),
        (["train"] * 20 + ["val"] * 10 + ["test"] * 10, {"train": 20, "val": 10, "test": 10}),
    ):
        splits, notes = datasets._deal_splits(dict(zip(names, source)), 0)
        assert Counter(splits.values()) == expected and len(notes) == (expected["train"] != 20)


def test_a_jpeg_of_104_megapixels_is_read_at_a_fraction(fails):
    data = encoded(Image.new("L", (11_776, 8_832), 77), "JPEG")
    image = read_image(data, size=224)
    assert image.shape == (1104, 1472, 3) and (image[9, 9] == 77).all()
    with fails("104,005,632 pixels, too many"):
        read_image(data)


@pytest.mark.parametrize(
    "text, words",
    [
        ("一只狗在草地上奔跑。", list("一只狗在草地上奔跑")),
        ("犬が走る、ラーメン2杯", [*"犬が走るラ", "ー", *"メン", "2", "杯"]),
        ("หมาวิ่ง", ["ห", "ม", "า", "วิ่", "ง"]),
        ("ឆ្កែ ໝາ", ["ឆ្", "កែ", "ໝ", "າ"]),
        ("개가 달린다 iPhone手机", ["개가", "달린다", "iphone", "手", "机"]),
    ],
)
def test_scripts_without_spaces_are_split_by_letter(text, words):
    assert datasets.tokenize(text) == words


def test_the_shapes_are_the_same_as_ever():
    digest = hashlib.sha256()
    for r in datasets.shapes_records(12, 2, 2, seed=0, size=64)[0]:
        digest.update("\n".join([r.name, *r.captions]).encode() + np.asarray(r.image(64)).tobytes())
    assert digest.hexdigest().startswith("e70f5e309730e38d0487dc301a8b14dc")
