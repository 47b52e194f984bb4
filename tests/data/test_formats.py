"""Tests of ``captioning/data/formats.py``."""

import json
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
from helpers import contents, rows_of, save_pictures, shown, write, write_csv
from PIL import Image

import datasets
from captioning.data import formats


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
    assert sum("1 picture without a caption in" in note for note in notes) == 1
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected a header that names the columns .*such as image,caption"),
        ("Bild,Text\n00.jpg,a dog\n", "expected a header .*; found 'Bild,Text'"),
        ("image,caption,x\n00.jpg,a dog,1\n01.jpg,a dog, runs,1\n", "line 3: 4 fields, expected 3"),
        ("caption,image\na dog, running,01.jpg\n", "line 2: 3 fields, expected 2"),
        ("image,caption\n00.jpg\n", "line 2: 1 fields, expected 2"),
        ('image,caption\n00.jpg,"a dog\n', "line 2: not valid CSV"),
        ("image,caption,split\n00.jpg,a dog,trian\n", "line 2: unknown split 'trian'"),
        (
            "image,caption,split\n00.jpg,a,train\n00.jpg,b,val\n",
            "line 3: 00.jpg is in val here, but in train",
        ),
        (
            "image,caption\n,a dog\n",
            "line 2: expected a picture's name .*; found image: '', caption: 'a dog'",
        ),
        ('{"image": "00.jpg", "caption": "a"}\n{"image": "01.jpg"\n', "line 2: not valid JSON"),
        ('{"image": "00.jpg", "caption": 5}\n', "line 1: expected"),
        ('{"image": true, "captions": ["a"]}\n', "line 1: expected"),
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
    with fails("line 3: not UTF-8 text: the byte FC, in Windows-1252 'ü'; save .*CSV UTF-8"):
        datasets.custom_records(folder, path, 0)


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
    parts = [*folder.iterdir()]  # each has its own 0.png
    records, notes = datasets.custom_records(parts, parts, 0)
    assert sorted((shown(r), r.split, r.captions) for r in records) == expected and not notes
    (tmp_path / "none").mkdir()
    with fails("none holds no metadata.csv or .jsonl"):
        datasets.custom_records(folder, tmp_path / "none", 0)


def test_texts_of_every_picture_lie_beside_it_or_in_a_folder_of_their_own(tmp_path):
    save_pictures(
        tmp_path / "own", [f"{s}/{i}.png" for s in ("train", "val", "test") for i in (0, 1)]
    )
    for path in [*(tmp_path / "own").rglob("*.png")]:
        path.with_suffix(".txt").write_text(f"a dog\n\na cat, {path.stem}\n")
        (path.parent / "notes.txt").write_text("nothing about a picture")
        for mac in (path, path.with_suffix(".txt")):  # which a Mac writes beside each file
            mac.with_name(f"._{mac.name}").write_bytes(b"\0\5\26\7\xe2")
    records, notes = datasets.custom_records(tmp_path / "own", tmp_path / "own", 0)
    assert [(shown(r), r.name, r.split) for r in records] == [
        (4, "test/0.png", "test"),
        (5, "test/1.png", "test"),
        (0, "train/0.png", "train"),
        (1, "train/1.png", "train"),
        (2, "val/0.png", "val"),
        (3, "val/1.png", "val"),
    ]
    assert records[1].captions == ["a dog", "a cat, 1"] and not notes
    (tmp_path / "texts" / "val").mkdir(parents=True)
    (tmp_path / "texts" / "val" / "1.txt").write_text("a bird")
    ((_, row),) = formats.read_rows(tmp_path / "texts", [])
    assert (row.name, row.split, row.captions) == ("val/1", "val", ["a bird"])


def test_a_digest_of_captions_changes_with_what_is_in_them(tmp_path):
    save_pictures(tmp_path, ["a/0.png"])
    (tmp_path / "a" / "0.txt").write_text("a dog")
    (tmp_path / "c.csv").write_text("image,caption\n0.png,a dog\n")
    seen = {formats.fingerprint([tmp_path / "a", tmp_path / "c.csv"])}
    for name, text in (("a/0.txt", "a cat"), ("c.csv", "x"), ("a/metadata.csv", "y")):
        (tmp_path / name).write_text(text)
        seen.add(formats.fingerprint([tmp_path / "a", tmp_path / "c.csv"]))
    assert len(seen) == 4 and all(text.startswith("a (SHA-256 ") for text in seen)


def test_flickr8k_in_chinese_and_other_token_lines(tmp_path):
    lines = ("1_a.jpg#zhc#0 一只狗", "1_a.jpg#1\ta dog # 5", "1_a.jpg.1#enc#2\tpeople &amp; dogs")
    rows, _ = rows_of(tmp_path / "tokens.txt", "\n".join(lines))
    assert rows == [
        ("1_a.jpg", None, ["一只狗"]),
        ("1_a.jpg", None, ["a dog # 5"]),
        ("1_a.jpg.1", None, ["people & dogs"]),
    ]


@pytest.mark.parametrize("form", ["arrays", "coco", "csv"])
def test_the_names_of_several_files_tell_their_splits(form, tmp_path):
    files = []
    for k, name in enumerate(("captions_train.json", "my-dev2017.json", "Test.json")):
        names = [f"{k}{i}.png" for i in range(5)]
        save_pictures(tmp_path / "p", names, 5 * k)
        content = [{"image": name, "caption": "a dog"} for name in names]
        if form == "coco":
            annotations = [{"image_id": i, "caption": "a dog"} for i in range(5)]
            images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
            content = {"images": images, "annotations": annotations}
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(content))
        if form == "csv":
            files[-1] = write_csv(files[-1].with_suffix(".csv"), [(n, "a dog") for n in names])
    records, notes = datasets.custom_records(tmp_path / "p", files, 0)
    expected = {"0": "train", "1": "val", "2": "test"}
    assert len(records) == 15 and all(r.split == expected[r.name[0]] for r in records)
    assert not notes
    # without a file for tests those for validation serve for both, as COCO's do
    records, _ = datasets.custom_records(tmp_path / "p", files[:2], 0)
    assert Counter(r.split for r in records) == {"train": 5, "val": 2, "test": 3}
    # and one file is all there is
    records, _ = datasets.custom_records(tmp_path / "p", files[2], 0)
    assert Counter(r.split for r in records) == {"train": 3, "val": 1, "test": 1}


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
    assert notes[0].startswith("1 caption of ") and "was read as the caption" in notes[0]
