"""Tests of ``captioning/data/json_files.py`` and of what ``rows.py`` makes of values."""

import json

import pytest
from helpers import rows_of

ROWS = [("a.png", None, ["a dog", "it runs"]), ("b.png", "val", ["a cat"])]
ENTRIES = [
    {"file_path": "a.png", "Captions": ["a dog", "it runs"], "caption_score": 5},
    {"Photo": "b.png", "caption": ["a", "cat"], "split": "dev", "text": None},
]
FORMS = {
    "array": ENTRIES,
    "names": {"a.png": ["a dog", "it runs"], "b.png": {"caption": "a cat", "split": "val"}},
    "words": {"a.png": [["a", "dog"], ["it", "runs"]], "b.png": {"text": "a cat", "split": "val"}},
    "numbers": dict(enumerate(ENTRIES)),
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_entries_and_objects_from_names_to_captions_are_read_alike(form, indent, tmp_path):
    found, _ = rows_of(tmp_path / "c.json", json.dumps(FORMS[form], indent=indent))
    assert found == ROWS


def test_an_object_may_hold_a_list_of_entries_for_each_split(tmp_path):
    content = {"train": ENTRIES[:1], "dev": [{"image": "c.png", "caption": "a bird"}]}
    found, _ = rows_of(tmp_path / "c.json", json.dumps(content))
    assert found == [("a.png", "train", ROWS[0][2]), ("c.png", "val", ["a bird"])]


def test_a_single_object_may_have_many_lines(tmp_path):
    found, _ = rows_of(tmp_path / "c.json", json.dumps(ENTRIES[0], indent=2))
    assert found == ROWS[:1]


@pytest.mark.parametrize(
    "value, captions",
    [
        (
            "fish &amp; chips &lt;3 it&#39;s &amp;#39;x&#x27; AT&T &copy",
            "fish & chips <3 it's 'x' AT&T &copy",
        ),
        (["A", "dog", "runs", "."], "A dog runs ."),
        (["dog"], "dog"),
    ],
)
def test_a_caption_is_read_as_a_person_would(value, captions, tmp_path):
    found, _ = rows_of(tmp_path / "c.json", json.dumps([{"image": "a", "caption": value}]))
    assert found == [("a", None, [captions])]


def test_short_captions_of_coco_and_karpathy_stay_apart(tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": text} for text in ("dog", "puppy")],
    }
    sentences = [{"raw": "dog"}, {"tokens": ["puppy"]}]
    karpathy = {"images": [{"filename": "a.png", "split": "val", "sentences": sentences}]}
    for content in (coco, karpathy):
        (found,), _ = rows_of(tmp_path / "c.json", json.dumps(content))
        assert found[2] == ["dog", "puppy"]


def test_damaged_json_of_many_lines_is_named_with_its_line(tmp_path, fails):
    text = json.dumps(ENTRIES, indent=2).replace('"split": ', '"split" ')
    with fails(f"line {text[: text.index('split')].count(chr(10)) + 1}: not valid JSON"):
        rows_of(tmp_path / "c.json", text)


def test_several_keys_with_captions_are_said(tmp_path):
    entry = {"image": "a.png", "caption": "a dog", "texts": ["nice"], "caption_idx": 3}
    found, notes = rows_of(tmp_path / "c.json", json.dumps([entry, entry]))
    assert found[0] == ("a.png", None, ["a dog", "nice"])
    (note,) = notes
    assert note.endswith("c.json has captions under the keys caption, texts")
    entry = {"image": "a.png", "caption": "a dog", "caption_author": "me", "text": None}
    assert rows_of(tmp_path / "c.json", json.dumps([entry])) == ([("a.png", None, ["a dog"])], [])


def test_a_caption_that_is_missing_is_an_empty_one(tmp_path):
    text = '{"image": "a.png", "caption": null}\n{"image": "b.png", "caption": NaN}\n'
    found, _ = rows_of(tmp_path / "c.jsonl", text)
    assert found == [("a.png", None, [""]), ("b.png", None, [""])]


def test_ids_as_text_and_as_numbers_are_the_same(tmp_path):
    annotations = [{"image_id": 7, "caption": "a dog"}]
    content = {"images": [{"id": "7", "file_name": "a.png"}], "annotations": annotations}
    found, _ = rows_of(tmp_path / "c.json", json.dumps(content))
    assert found == [("a.png", None, ["a dog"])]


def test_rows_below_a_key_are_read(tmp_path):
    rows = [{"image": "a.png", "caption": "a dog", "split": "val"}]
    for content in ({"data": rows}, {"info": {"year": 2026}, "licenses": [], "data": rows}):
        assert rows_of(tmp_path / "c.json", json.dumps(content))[0] == [("a.png", "val", ["a dog"])]
