"""Tests of ``captioning/model/utterances.py``: captions from Python."""

import math

import numpy as np
import pytest
import torch
from conftest import make_picture
from helpers import save
from PIL import Image

import datasets
import models


@pytest.fixture
def captioner(talkative):
    return models.load_captioner(talkative)


def test_a_caption_says_the_words_where_it_looked_and_what_else_was_likely(
    captioner, talkative, describe
):
    path = save("pictures/photo.png")
    said = captioner(path, max_decode_steps=6)
    image = torch.from_numpy(datasets.resize_image(make_picture(0), 64))[None]
    ((expected,),) = captioner.caption(image, max_decode_steps=6, no_repeat=True)
    assert said.text == str(said) == " ".join(said.words) and said.words
    assert said.words == captioner.text(expected)
    assert said.word_probs == pytest.approx([math.exp(p) for p in expected.word_log_probs])
    figures = (said.log_prob, said.score, said.ended)
    assert figures == (expected.log_prob, expected.score, expected.ended)
    assert said.attention.shape == (len(said.words), 2, 2)  # rows and columns of the grid
    assert np.array_equal(said.attention.reshape(-1, 4), expected.alphas.numpy())
    assert said.attention.sum(axis=(1, 2)) == pytest.approx(np.ones(len(said.words)))
    assert len(said.alternatives) == len(said.words)
    for word, chance, others in zip(said.words, said.word_probs, said.alternatives):
        assert len(others) == 5 and others == sorted(others, key=lambda pair: -pair[1])
        assert dict(others).get(word, chance) == pytest.approx(chance, abs=1e-4)
    assert "array" not in repr(said) and said.text in repr(said)
    _, (result,) = describe("--model", talkative, "--img", path, "--no_plot")  # as the prompt says
    assert result["captions"][0]["caption"] == said.text


def test_a_picture_may_be_a_path_an_image_of_any_mode_or_an_array(captioner, tmp_path):
    pixels = make_picture(3).copy()
    path = save(tmp_path / "photo.png", 3)
    rgb, square = Image.fromarray(pixels), datasets.resize_image(pixels, 64)
    same = [path, str(path), Image.open(path), rgb, pixels, torch.from_numpy(pixels), square]
    same += [rgb.convert("RGBA"), np.asarray(rgb.convert("RGBA")), torch.from_numpy(square)]
    said = captioner(same, max_decode_steps=6)
    assert [s.text for s in said] == [captioner(rgb, max_decode_steps=6).text] * len(same)
    grey = rgb.convert("L")
    greys = [grey, np.asarray(grey), np.asarray(grey)[..., None], grey.convert("LA")]
    assert len({s.text for s in captioner(greys, max_decode_steps=6)}) == 1
    for mode in ("1", "P", "CMYK", "I", "F", "YCbCr", "HSV", "LAB"):
        assert captioner(rgb.convert(mode), max_decode_steps=6).words


def test_a_turned_picture_is_seen_upright(captioner, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(make_picture(3)).save(tmp_path / "turned.png", exif=exif)
    upright = Image.fromarray(make_picture(3)).rotate(-90, expand=True)
    seen = [captioner(p) for p in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png"))]
    expected = captioner(upright)
    assert [(s.text, s.log_prob) for s in seen] == [(expected.text, expected.log_prob)] * 2


def test_a_list_gives_a_list_in_order_and_n_best_several_of_each(captioner):
    pictures = [make_picture(i) for i in range(35)]  # more than one batch
    said = captioner(pictures, max_decode_steps=6)
    alone = [captioner(picture, max_decode_steps=6).text for picture in pictures]
    assert [s.text for s in said] == alone and len(set(alone)) > 1
    assert [s.text for s in captioner(np.stack(pictures), max_decode_steps=6)] == alone
    (three,) = captioner([pictures[0]], n_best=3, max_decode_steps=6)
    assert len({s.text for s in three}) == 3
    assert three == sorted(three, key=lambda s: -s.score)
    again = captioner(pictures[0], n_best=3, max_decode_steps=6)
    assert [s.text for s in again] == [s.text for s in three]
    assert three[0].text == alone[0] and captioner([]) == []
    assert captioner(pictures[0], with_alphas=False).attention is None


@pytest.mark.parametrize(
    "picture, message",
    [
        ("missing.jpg", "missing.jpg"),
        (None, "no picture: expected a path, a PIL image, or an array"),
        (7, "no picture: expected a path"),
        (np.zeros((4, 4, 3)), r"an array of float64, \(4, 4, 3\): expected"),
        (np.zeros((4, 4, 2), np.uint8), r"an array of uint8, \(4, 4, 2\): expected"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of uint8, \(0, 4, 3\): expected"),
        (torch.zeros(4, 4, 3, device="meta"), "expected a path, a PIL image"),
    ],
)
def test_what_is_no_picture_ends_in_one_line(picture, message, captioner, fails):
    with fails(message):
        captioner(picture)


def test_an_image_that_ends_in_the_middle_ends_in_one_line(captioner, tmp_path, fails):
    path = save(tmp_path / "photo.png")
    path.write_bytes(path.read_bytes()[:300])
    with fails("cannot read the picture"):
        captioner(Image.open(path))
