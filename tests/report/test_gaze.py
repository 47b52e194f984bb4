"""Tests of ``captioning/report/gaze.py``."""

import json
import types

import pytest
import torch

import models
from captioning.report import gaze as gaze_room

WORDS = ["<pad>", "<start>", "<unk>", "<end>", "dog", "runs", "in", "the"]


SAID = [[7, 4, 5], [7, 4, 6, 7, 5], [], [4]]


@pytest.fixture
def gaze():
    """Function of a change to a decoder, of features and options: the figures of its gaze."""

    def measure(change=lambda decoder: None, features=None, said=SAID, grid=0, **options):
        torch.manual_seed(0)
        decoder = models.DecoderWithAttention(len(WORDS), 12, 8, 8, 8, encoded_image_size=grid)
        with torch.no_grad():
            change(decoder.eval())
        word_map = {word: i for i, word in enumerate(WORDS)}
        captioner = types.SimpleNamespace(
            decoder=decoder, words=WORDS, word_map=word_map, device=torch.device("cpu")
        )
        if features is None:
            features = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))
        hypotheses = [types.SimpleNamespace(words=words) for words in said]
        return gaze_room.measure_gaze(captioner, features, hypotheses, **options)

    return measure


def test_attention_that_is_even_covers_all_places_and_never_moves(gaze):
    found = gaze(lambda decoder: decoder.attention.full_att.weight.zero_())
    assert found["places"] == pytest.approx(16) and found["function places"] == pytest.approx(16)
    assert found["peak"] == pytest.approx(1 / 16) and found["num_pixels"] == 16
    assert found["movement"] == pytest.approx(0, abs=1e-6)


def test_attention_on_one_place_counts_one_and_the_words_feel_its_deletion(gaze):
    def marks(decoder):  # one channel marks a place, and attention looks for nothing else
        decoder.attention.encoder_att.weight.zero_()
        decoder.attention.encoder_att.weight[:, 0] = 100
        decoder.attention.full_att.weight.fill_(1)
        decoder.decode_step.weight_ih.mul_(5)

    features = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))
    features[:, :, 0] = 0
    features[:, 3, 0] = 1
    found = gaze(marks, features)
    assert found["places"] == pytest.approx(1, abs=1e-3)
    assert found["peak"] == pytest.approx(1, abs=1e-3)
    # a random tenth is 2 of 16 places, so it seldom holds the one that matters
    assert abs(found["fall"]) > 2 * abs(found["random fall"])


def test_only_what_attention_sees_at_the_word_is_deleted(gaze):
    # the state never hears of what attention saw
    found = gaze(lambda decoder: decoder.decode_step.weight_ih.zero_())
    assert found["fall"] == pytest.approx(0, abs=1e-5)
    assert found["random fall"] == pytest.approx(0, abs=1e-5)
    assert found["movement"] > 0


def test_the_size_of_a_batch_does_not_change_the_gaze(gaze):
    one, all_at_once = gaze(batch_size=1), gaze(batch_size=4)
    for name in ("places", "function places", "peak", "movement", "fall"):
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-4, abs=1e-6)


def test_the_first_pictures_are_measured_whatever_process_holds_their_features(monkeypatch):
    captioner = types.SimpleNamespace(config={"attention": "soft"})
    shares, gathered = torch.arange(10.0).view(2, 5, 1, 1), []
    monkeypatch.setattr(gaze_room, "all_gather", lambda part: gathered.append(part) or [part])
    for start, share in zip((0, 5), shares):
        gaze_room.gaze_features([captioner], share, start, pictures=7)
    assert torch.cat(gathered).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    captioner.config["attention"] = "mean"
    assert gaze_room.gaze_features([captioner], shares[0], 0) is None


def test_a_grid_of_another_size_than_the_encoders_is_measured_too(gaze):
    found = gaze(grid=2)
    assert found["num_pixels"] == 4 and 1 <= found["places"] <= 4 and found["fall"] != 0


@pytest.mark.parametrize("said", [[[7], [6], [7], [6]], [[], [], [], []]])
def test_what_has_no_content_words_has_no_gaze_of_them(said, gaze):
    found = gaze(said=said)
    assert found.get("places") is None and "deletion ratio" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_words_of_the_list_are_function_words():
    assert {"a", "in", "the", "with", "is"} <= gaze_room.FUNCTION_WORDS
    assert not {"dog", "red", "runs", "two", "standing"} & gaze_room.FUNCTION_WORDS
