"""Tests of ``captioning/data/features.py``."""

import os

import pytest
import torch

import datasets


def test_a_finished_feature_store_needs_no_right_to_write(tmp_path, shapes_train, monkeypatch):
    encode = lambda images: torch.ones(len(images), 4, 3)
    made = datasets.encode_split(shapes_train, encode, tmp_path / "f.npy")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert (datasets.encode_split(shapes_train, None, tmp_path / "f.npy") == made).all()


def test_no_share_has_no_features(shapes_train):
    assert len(datasets.encode_split(shapes_train, None, rows=slice(0, 0))) == 0


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
