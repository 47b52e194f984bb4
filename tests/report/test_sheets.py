"""Tests of ``captioning/report/sheets.py``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from helpers import save, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import models
from captioning.report import sheets

SIZES = st.sampled_from(
    [(48, 36), (36, 48), (400, 8), (8, 400), (1, 1), (3000, 20), (20, 3000), (64, 64)]
)


WORDS = st.lists(
    st.sampled_from(["a", "dog", "running", "skateboarders", "漢字", "é", "🐕", "m" * 40, "$x$"]),
    max_size=30,
)


pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing")


def sheet_of(size, words, places=49):
    picture = Image.fromarray(make_picture(1, *size))
    return sheets.attention_sheet(picture, words, torch.rand(len(words), places).softmax(1))


def pixels_of(figure):
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


@settings(max_examples=25, deadline=None)
@given(SIZES, WORDS, st.sampled_from([1, 2, 7, 14]))
@example((8, 400), ["m" * 40], 1)  # a word that is wider than its panel in the smallest letters
def test_the_sheet_has_a_panel_for_every_word_and_the_whole_caption_above(size, words, side):
    sheet = sheet_of(size, words, side * side)
    pixels, texts = pixels_of(sheet), [text.get_text() for text in sheet.texts]
    assert len(sheet.images) == len(words) + 1 and texts[-len(words) - 1 :] == [
        "the picture",
        *words,
    ]
    said = " ".join(texts[: texts.index("the picture") - 1]).split()
    assert said == (words or ["(no", "words)"])
    assert 100 < pixels.shape[1] < 12000 and 80 < pixels.shape[0] < 12000
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()  # nothing is cut at the margins


@pytest.mark.parametrize("number", [1, 2, 5, 10, 20, 30])
def test_the_sheet_is_near_a_screens_shape_and_grows_with_the_words(number):
    height, width, _ = pixels_of(sheet_of((300, 200), ["dog"] * number)).shape
    assert 1 < width / height < 3 and width * height > (number + 1) * 150 * 150


def test_the_sheet_says_how_far_attention_is_spread():
    picture = Image.fromarray(make_picture(1))
    one, all_of_them = torch.eye(16)[:1], torch.full((1, 16), 1 / 16)
    for alphas, expected in ((one, 1), (all_of_them, 16)):
        sheet = sheets.attention_sheet(picture, ["dog"], alphas)
        note = f"attention spread over {expected} of 16 places"
        assert note in [text.get_text() for text in sheet.texts]


def test_with_a_sentinel_each_word_says_how_much_it_looks():
    picture = Image.fromarray(make_picture(1))
    alphas = torch.tensor([[0.31, 0.31, 0, 0, 0.38], [0.01, 0.01, 0.01, 0.01, 0.96]])
    sheet = sheets.attention_sheet(picture, ["dog", "of"], alphas)
    texts = [text.get_text() for text in sheet.texts]
    assert texts[-2:] == ["dog  (looks 62%)", "of  (looks 4%)"]
    assert "attention spread over 3 of 4 places; words look 33% on average" in texts
    # a word that hardly looks lights nothing
    looks, hardly = (np.asarray(image.get_array()).mean() for image in sheet.images[1:])
    assert hardly < looks
    whole, *frames, _ = sheets.attention_frames(picture, ["dog", "of"], alphas)
    assert len(frames) == 2 and all(frame.shape == whole.shape for frame in frames)


def test_panels_are_lit_where_the_model_looked():
    picture = Image.fromarray(np.full((90, 90, 3), (200, 60, 60), np.uint8))
    alpha = torch.full((9,), 0.02)
    alpha[2] = 0.84  # above, on the right
    view = sheets.spotlight(picture, alpha).astype(int)
    assert abs(view[10, 80] - (200, 60, 60)).max() < 12
    assert view[80, 10].max() < 80 and np.ptp(view[80, 10]) < 20  # dim and grey elsewhere
    even = sheets.spotlight(picture, torch.full((9,), 1 / 9))
    assert np.ptp(even, axis=(0, 1)).max() <= 1


@settings(max_examples=15, deadline=None)
@given(SIZES, WORDS)
def test_frames_are_of_one_size_one_for_each_word_and_the_picture_at_both_ends(size, words):
    picture, alphas = Image.fromarray(make_picture(1, *size)), torch.rand(len(words), 4).softmax(1)
    frames = sheets.attention_frames(picture, words, alphas)
    assert len(frames) == len(words) + 2 and len({frame.shape for frame in frames}) == 1
    assert np.array_equal(frames[0], frames[-1])
    height, width, _ = frames[0].shape
    assert 160 <= width <= max(picture.width, 160) + 40 and 60 <= height < 3000


@pytest.mark.parametrize("words, side", [(10, 224), (30, 224), (12, 1024)])
def test_a_gif_stays_below_600_kb(words, side, describe, monkeypatch):
    grain = np.random.default_rng(0).integers(-24, 24, (side, side, 3))  # as photographs have
    pixels = np.clip(make_picture(1, side, side) + grain, 0, 255).astype(np.uint8)
    path = save("pictures/photo.png")
    Image.fromarray(pixels).save(path)
    monkeypatch.setattr(models.Captioner, "text", lambda self, hypothesis: ["word"] * words)
    alphas = (2 * torch.randn(words, 64)).softmax(1)
    search = models.beam_search
    monkeypatch.setattr(
        models,
        "beam_search",
        lambda *args, **options: [
            [h._replace(alphas=alphas) for h in found] for found in search(*args, **options)
        ],
    )
    describe("--img", path, "--gif")
    assert written() == {"photo_attention.png", "photo_attention.gif"}
    gif = Path("out/photo_attention.gif")
    assert gif.stat().st_size < 600_000
    with Image.open(gif) as animation:
        assert animation.format == "GIF" and animation.n_frames == words + 2


def test_a_model_that_says_nothing_is_drawn_too(best_checkpoint, describe, tmp_path_factory):
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["decoder"]["fc.bias"][checkpoint["word_map"]["<end>"]] = 1e4
    silent = tmp_path_factory.mktemp("silent") / "silent.pth.tar"
    models.save_checkpoint(silent, checkpoint)
    _, (result,) = describe("--img", save("pictures/photo.png"), "--model", silent, "--gif")
    assert result["captions"][0]["caption"] == ""
    assert written() == {"photo_attention.png", "photo_attention.gif"}
