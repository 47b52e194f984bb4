"""Words, pictures, sources, scenes and the HDF5 files."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from conftest import make_picture
from helpers import broken, record, write
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from datasets import END, PAD, START, UNK, CaptionDataset, Record
from utils import UserError


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


@given(st.lists(st.integers(-24, 23), max_size=8))
@settings(max_examples=40)
def test_pictures_come_in_the_order_asked_for(opened, indices):
    everything = opened.images(slice(None))
    assert (opened.images(indices) == everything[np.array(indices, int)]).all()
    assert (opened.images(slice(2, 20, 3)) == everything[2:20:3]).all()


@pytest.fixture(scope="module")
def opened(shapes_data):
    return CaptionDataset(datasets.split_path(shapes_data[0], "train", shapes_data[1]))


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


def test_unreadable_picture_is_named_and_left_out(tmp_path):
    records = everywhere()
    records += [
        record(i, captions=[f"number {i}"], image=broken if i == 30 else None) for i in range(3, 60)
    ]
    (train, _, _), summaries, _ = write(tmp_path, records)
    assert summaries["train"]["unreadable"] == {"30.jpg": "cannot read the picture"}
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


def test_a_caption_of_max_len_words_is_trained_on_and_a_longer_one_is_not(tmp_path):
    texts = ["a dog runs", "a dog runs on", "a dog runs on grass"]
    (train_data, *_), summaries, _ = write(tmp_path, everywhere(texts), max_len=4)
    assert train_data.caption_lengths.tolist() == [5, 6]
    assert summaries["train"]["too_long"] == 1
