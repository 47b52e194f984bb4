"""Tests of ``captioning/data/hdf5.py``."""

import errno
import multiprocessing
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from helpers import packed

import datasets
from captioning.run import paths
from captioning.run.messages import UserError
from datasets import CaptionDataset


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


def test_what_is_no_file_of_ours_is_refused(shapes_data, tmp_path, fails):
    whole = datasets.split_path(shapes_data[0], "val", shapes_data[1]).read_bytes()
    path = tmp_path / "VAL.hdf5"
    with fails(f"there is no {tmp_path}.*--data_folder, or make it with create_input_files.py"):
        CaptionDataset(path)
    (tmp_path / "VAL_mine_5_cap.hdf5").touch()
    with fails(r"there is no .*VAL_mine.hdf5; its folder has mine_5_cap \(--data_name\)"):
        CaptionDataset(tmp_path / "VAL_mine.hdf5")
    for data in (b"", b"text" * 999, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with fails("VAL.hdf5 cannot be used"):
            CaptionDataset(path)
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(5)
    with fails("another format"):
        CaptionDataset(path)


def test_data_of_others_that_may_not_be_read_is_not_called_damaged(
    shapes_train, tmp_path, monkeypatch, fails
):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    store = tmp_path / "FEATURES_TRAIN_x.npy"
    store.touch()
    monkeypatch.setattr(np, "load", refuse)
    with fails("FEATURES_TRAIN_x.npy may not be read: ask its owner"):
        datasets.encode_split(shapes_train, None, store, 2, 1)
    monkeypatch.setattr(h5py, "File", refuse)
    (tmp_path / "VAL.hdf5").touch()
    with fails("VAL.hdf5 may not be read: ask its owner"):
        CaptionDataset(tmp_path / "VAL.hdf5")


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


def test_files_written_before_have_no_ids(shapes_train):
    assert shapes_train.image_ids == [None] * 24 and "image_ids" not in h5py.File(shapes_train.path)


def test_data_made_anew_under_a_reader_is_said(tmp_path):
    """Else captions in memory would be paired with other pictures."""
    options = {"dataset": "own", "source": "own", "min_word_freq": 1, "image_size": 64}
    for seed in (1, 2):
        records, _ = datasets.shapes_records(3, 1, 1, seed=seed, size=64)
        datasets.write_dataset(tmp_path, records, **options)
        if seed == 1:
            path = paths.split_path(tmp_path, "train", datasets.base_name("own", 5, 1))
            data = CaptionDataset(path)
            assert data.images([0]).any()
    for read in (lambda: data.images([0]), lambda: data.references):
        with pytest.raises(UserError, match="made anew, of other pictures, while it was in use"):
            read()
