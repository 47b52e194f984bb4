"""What several test files need: pictures, captions, a six-word vocabulary, a small generated data set."""

import json

import numpy as np
import pytest
from PIL import Image

import datasets
import utils


@pytest.fixture
def word_map():
    """A vocabulary of six words."""
    words = ("a", "dog", "runs", "on", "the", "grass")
    return {word: i for i, word in enumerate([datasets.PAD, *words, datasets.UNK, datasets.START, datasets.END])}


def make_picture(seed, width=48, height=36):
    """A smooth coloured picture, uint8 (height, width, 3), of its own for each seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def picture():
    """Function of a seed: a small picture as uint8 (height, width, 3)."""
    return make_picture


@pytest.fixture
def own_data(tmp_path):
    """Twenty JPEG pictures in a folder, and three captions of each with splits, as CSV.

    :return: (folder of pictures, CSV file)
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["image,caption,split"]
    for i in range(20):
        Image.fromarray(make_picture(i)).save(folder / f"{i:02d}.jpg", quality=95)
        split = {18: "val", 19: "test"}.get(i, "train")
        texts = (f"A dog runs on grass {i}.", '"The dog, it runs"', "A grass")
        rows += [f"{i:02d}.jpg,{text},{split}" for text in texts]
    captions = tmp_path / "captions.csv"
    captions.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder, captions


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory):
    """A small shapes data set: 24 / 6 / 6 pictures of 64 pixels, all words kept. Do not write into it.

    :return: (folder, name)
    """
    folder = tmp_path_factory.mktemp("shapes")
    records, _ = datasets.shapes_records(24, 6, 6, seed=1, size=64)
    datasets.write_dataset(folder, records, dataset="shapes", source="generated", min_word_freq=1, max_len=20,
                           image_size=64, seed=1)
    return folder, datasets.base_name("shapes", 5, 1)


@pytest.fixture
def shapes_train(shapes_data):
    """Training split of the small shapes data set, opened anew."""
    folder, name = shapes_data
    return datasets.CaptionDataset(datasets.split_path(folder, "train", name))


@pytest.fixture
def shapes_word_map(shapes_data):
    """Word map of the small shapes data set."""
    return datasets.load_word_map(datasets.word_map_path(*shapes_data))


@pytest.fixture
def write_bad_json(tmp_path):
    """Function of a value: the path of a JSON file that holds it."""
    def write(value):
        path = tmp_path / "value.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fails():
    """``with fails("word")``: the block must end in a one-line message for the user that holds the word."""
    def expect(match):
        return pytest.raises(utils.UserError, match=rf"\A[^\n]*{match}[^\n]*\Z")

    return expect
