"""Tests of ``captioning/report/others.py``."""

import json
from pathlib import Path

import pytest

from captioning.report import lists, others

NAMES = ["a/COCO_val2014_000000391895.jpg", "b/COCO_val2014_000000522418.jpg", "c/7.jpg"]


class Split:
    split, name, image_names = "test", "mine", NAMES
    __len__ = lambda self: len(NAMES)


def split_of(ids):
    data = Split()
    data.image_ids = ids
    return data


IDS = [391895, 522418, 7]


@pytest.fixture
def results(tmp_path):
    """Function of entries: the path of a file that holds them."""

    def write(entries):
        path = tmp_path / "theirs.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return write


def entries(key, values):
    rows = [{key: value, "caption": f"A dog, number {i}."} for i, value in enumerate(values)]
    return rows[::-1]


@pytest.mark.parametrize(
    "key, values, ids",
    [
        ("image_id", IDS, IDS),
        ("image_id", list(map(str, IDS)), IDS),
        ("image_id", [0, 1, 2], [391895, None, 7]),  # row numbers, as eval.py writes them
        ("image_id", [name[2:-4] for name in NAMES], [None] * 3),
        ("image_id", [name[2:] for name in NAMES], IDS),
        ("file_name", NAMES, [None] * 3),
        ("file_name", [name[2:] for name in NAMES], IDS),
        ("file_name", [f"elsewhere/{name}" for name in NAMES], [None] * 3),
        ("file_name", [f"C:\\pictures\\{name[2:]}" for name in NAMES], IDS),
        ("image_id", [f"elsewhere/{name[:-4]}" for name in NAMES], [None] * 3),
        ("file_name", [name.upper() for name in NAMES], IDS),
        ("image", NAMES, IDS),
        ("filename", [name[2:] for name in NAMES], [None] * 3),
        ("image_id", [f"{number:012d}" for number in IDS], IDS),
    ],
)
def test_a_picture_is_known_by_its_id_or_its_name(key, values, ids, results):
    found = others.read_captions(results(entries(key, values)), split_of(ids))
    assert found == [["a", "dog", "number", str(i)] for i in range(3)]


def test_a_name_goes_before_a_row_number(results):
    rows = entries("file_name", NAMES)
    for number, row in enumerate(rows):
        row["image_id"] = number  # of another order
    found = others.read_captions(results(rows), split_of([None] * 3))
    assert [words[-1] for words in found] == ["0", "1", "2"]


def test_a_number_that_is_a_files_name_goes_before_a_row_number(results):
    data = split_of([None] * 3)
    data.image_names = ["2.jpg", "0.jpg", "1.jpg"]
    for number in (int, str):
        rows = [{"image_id": number(i), "caption": f"number {i}"} for i in range(3)]
        found = others.read_captions(results(rows), data)
        assert [words[-1] for words in found] == ["2", "0", "1"]


def test_a_caption_is_split_into_words_as_the_references_are(results):
    rows = entries("image_id", IDS)
    rows[0]["caption"] = "dogs run &amp;amp; jump"
    assert ["dogs", "run", "jump"] in others.read_captions(results(rows), split_of(IDS))


def test_captions_of_other_pictures_are_left_out_and_counted(results, capsys):
    rows = [*entries("image_id", IDS), {"image_id": 8, "caption": "a cat"}]
    assert len(others.read_captions(results(rows), split_of(IDS))) == 3
    said = capsys.readouterr().err
    assert "theirs.json: 1 captions of pictures that are not in the test split of mine" in said


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[1:], r"1 of 3 pictures of the test split of mine have no caption \(c/7"),
        (
            lambda rows: [*rows, rows[0]],
            r"1 of 3 .* have several captions \(c/7.jpg\); expected one",
        ),
        (lambda rows: [], "none of its 0 captions is of a picture of the test .*image_id 391895"),
        (lambda rows: {"captions": rows[0]["caption"]}, "none of its 1 captions is of a picture"),
        (lambda rows: [*rows, {"image_id": 7}], "entry 4 is {'image_id': 7}; expected COCO's"),
        (lambda rows: [3], "entry 1 is 3; expected COCO's"),
        (lambda rows: [{"image_id": 7, "caption": ["a"]}], "entry 1 is .*; expected COCO's"),
        (lambda rows: [{"image_id": [7], "file_name": 3, "caption": "a"}], "none of its 1 capt"),
    ],
)
def test_missing_doubled_and_strange_captions_are_named(change, message, results, fails):
    with fails(message):
        others.read_captions(results(change(entries("image_id", IDS))), split_of(IDS))


def test_names_that_two_pictures_share_tell_nothing(results, fails):
    data = split_of([None] * 3)
    data.image_names = ["a/1.jpg", "b/1.jpg", "c/7.jpg"]
    with fails("2 of 3 pictures of .* have no caption"):
        others.read_captions(results(entries("file_name", ["1.jpg", "1.jpg", "7.jpg"])), data)


def test_an_id_of_the_source_goes_before_a_files_name(results):
    data = split_of([1, 2, 3])
    data.image_names = ["2.jpg", "1.jpg", "3.jpg"]
    for number in (int, str):
        rows = [{"image_id": number(i), "caption": f"number {i}"} for i in (1, 2, 3)]
        found = others.read_captions(results(rows), data)
        assert [words[-1] for words in found] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["json", "csv", "txt"])
@pytest.mark.parametrize("ids", [IDS, [None] * 3])
def test_lists_that_caption_py_writes_are_read(kind, ids, tmp_path):
    said = [{"caption": f"a dog, number {i}", "log_prob": -1.5, "ended": True} for i in range(3)]
    listed = [lists.result(Path(name), [caption]) for name, caption in zip(NAMES, said)]
    lists.write_list(kind, tmp_path / f"c.{kind}", listed[::-1])
    found = others.read_captions(tmp_path / f"c.{kind}", split_of(ids))
    assert found == [["a", "dog", "number", str(i)] for i in range(3)]


def test_a_table_of_ids_and_captions_is_read(tmp_path):
    rows = "".join(f"{number},a dog <end>\n" for number in IDS)
    (tmp_path / "c.csv").write_text(f"image_id,caption\n{rows}")
    assert others.read_captions(tmp_path / "c.csv", split_of(IDS)) == [["a", "dog"]] * 3
