"""Tests of ``captioning/data/sources.py``."""

import shutil
import zipfile
from collections import Counter

import pytest
from helpers import contents, make_flickr8k, save_pictures
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import datasets
from captioning.data import sources


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


@given(st.sets(st.text(min_size=1, max_size=9), min_size=3), st.integers(0, 9), st.randoms())
def test_missing_splits_are_dealt_fairly_and_whatever_the_order(names, seed, rng):
    names = sorted(names)
    dealt = sources._deal_splits(dict.fromkeys(names), seed)[0]
    rng.shuffle(names)
    assert sources._deal_splits(dict.fromkeys(names), seed)[0] == dealt
    counts = Counter(dealt.values())
    assert (
        counts["val"] == counts["test"] == max(1, round(len(names) / 10)) and counts["train"] >= 1
    )


def test_pictures_and_captions_without_each_other_are_said(own_data):
    folder, path = own_data
    with open(path, "a") as file:
        file.write("ghost.jpg,nobody,train\n00.jpg,A grass,train\n")
    Image.new("RGB", (9, 9)).save(folder / "unused.png")
    (folder / "readme.txt").write_text("not a picture")
    records, notes = datasets.custom_records(folder, path, 0)
    assert len(records) == 20 and records[0].captions.count("A grass") == 1
    expected = ("'ghost.jpg' is missing", "1 row of", "1 picture of")
    assert len(notes) == 3 and all(words in note for words, note in zip(expected, notes))


def test_what_is_missing_or_mute_is_not_dealt_to_a_split(own_data, tmp_path):
    """Each of ten pictures in turn: a split of one picture would be empty."""
    folder, path = own_data
    for i in range(10):
        for gone in (f"{i:02d}.jpg,", f"ghost{i}.jpg,a dog"):
            rows = [f"{j:02d}.jpg,a dog" for j in range(10) if j != i]
            (tmp_path / "ten.csv").write_text("\n".join(["image,caption", *rows, gone]))
            records, notes = datasets.custom_records(folder, tmp_path / "ten.csv", 0)
            kept = Counter(record.split for record in records if record.captions[0])
            assert kept == {"train": 7, "val": 1, "test": 1} and "dealt" in notes[0]


@pytest.mark.parametrize("other, is_told", [("Test", True), ("dev", True), ("more", False)])
def test_folders_of_the_pictures_tell_their_splits(other, is_told, tmp_path):
    names = [f"{folder}/{i}.png" for folder in ("train", other) for i in range(10)]
    folder = save_pictures(tmp_path / "pictures", names)
    rows = [f"{name},a dog" for name in names]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption", *rows]))
    records, notes = datasets.custom_records(folder, tmp_path / "c.csv", 0)
    pure = all((r.split == "train") == r.name.startswith("train") for r in records)
    told = any(note.startswith("no split is named: it was taken from") for note in notes)
    lacking = {"Test": "val", "dev": "test"}.get(other)
    dealt = [r for r in records if r.split == lacking]
    assert told == is_told and (not is_told or all(r.name.startswith("train") for r in dealt))
    assert is_told or not pure


def test_a_split_that_the_source_lacks_is_dealt_out():
    names = [f"{i}" for i in range(40)]
    for source, expected in (
        ([None] * 40, {"train": 32, "val": 4, "test": 4}),
        (["train"] * 40, {"train": 32, "val": 4, "test": 4}),
        (["train"] * 30 + ["val"] * 10, {"train": 27, "val": 10, "test": 3}),
        (["train"] * 30 + [None] * 10, {"train": 30, "val": 5, "test": 5}),
        (["train"] * 20 + ["val"] * 10 + ["test"] * 10, {"train": 20, "val": 10, "test": 10}),
    ):
        splits, notes = sources._deal_splits(dict(zip(names, source)), 0)
        assert Counter(splits.values()) == expected and len(notes) == (expected["train"] != 20)
        all_are_named = notes and None not in source
        assert not notes or notes[0].startswith("no picture is named") == bool(all_are_named)
    (note,) = sources._deal_splits(dict.fromkeys(names, "train"), 0)[1]
    assert note.startswith("no picture is named test or val: the 40 of train are dealt out by")


def test_another_seed_deals_other_splits():
    names = dict.fromkeys(map(str, range(100)))
    assert sources._deal_splits(names, 0)[0] != sources._deal_splits(names, 1)[0]
