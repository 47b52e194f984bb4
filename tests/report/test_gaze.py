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

    def measure(
        change=lambda decoder: None, features=None, said=SAID, grid=0, wrap=lambda d: d,
        attention="soft", **options,
    ):  # fmt: skip
        torch.manual_seed(0)
        sizes = len(WORDS), 12, 8, 8, 8, attention, grid
        decoder = models.DecoderWithAttention(*sizes)
        with torch.no_grad():
            change(decoder.eval())
        word_map = {word: i for i, word in enumerate(WORDS)}
        captioner = types.SimpleNamespace(
            decoder=wrap(decoder), words=WORDS, word_map=word_map, device=torch.device("cpu")
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


def test_a_sentinel_that_never_looks_feels_no_deletion(gaze):
    """Its cell reads the picture's mean feature, which is not what attention sees."""

    @torch.no_grad()
    def never_looks(decoder):
        network = decoder.attention
        network.encoder_att.bias.fill_(-1e4)  # the ReLU makes 0 of every place
        network.decoder_att.weight.zero_(), decoder.sentinel.sentinel_att.weight.zero_()
        network.decoder_att.bias.fill_(1), network.full_att.weight.fill_(100)

    found = gaze(never_looks, attention="adaptive")
    assert found["looks"] < 0.1
    assert found["fall"] == pytest.approx(0, abs=1e-4)


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
    monkeypatch.setattr(gaze_room, "all_gather", lambda part: [part, torch.zeros(0, 1, 1)])
    found = gaze_room.gaze_features([captioner], torch.ones(2, 4, 3), 0)  # the other has none
    assert found.shape == (2, 4, 3)
    captioner.config["attention"] = "mean"
    none = gaze_room.gaze_features([captioner], shares[0], 0)
    assert len(none) == 0 and gaze_room.measure_gaze(captioner, none, []) == {}


def test_with_a_sentinel_the_gaze_says_how_much_words_look_and_which_look_least():
    looks = {1: 0.2, 7: 0.6, 4: 0.4, 6: 0.8}  # after <start>, "the", "dog", "in"

    class Decoder:
        def init_hidden_state(self, images):
            return images, (torch.zeros(len(images), 1, 1),)

        def step(self, words, state, images):
            share = torch.tensor([looks.get(word, 0.5) for word in words[:, 0].tolist()])
            share = share.view(-1, 1)  # there may be no words
            places = torch.tensor([0.5, 0.5] + 14 * [0])
            alpha = torch.cat([share * places, 1 - share], dim=1)
            attention = types.SimpleNamespace(alpha=alpha[:, None])
            return torch.zeros(len(words), 1, len(WORDS)), attention, state

    device = torch.device("cpu")
    word_map = {word: i for i, word in enumerate(WORDS)}
    captioner = types.SimpleNamespace(
        decoder=Decoder(), words=WORDS, word_map=word_map, device=device
    )
    hypotheses = [types.SimpleNamespace(words=words) for words in 2 * SAID]
    found = gaze_room.measure_gaze(captioner, torch.randn(8, 16, 12), hypotheses)
    assert found["num_pixels"] == 16 and found["places"] == pytest.approx(2)
    assert found["peak"] == pytest.approx(0.5) and found["movement"] == pytest.approx(0, abs=1e-6)
    # "dog" after "the" twice and after <start> once, "runs" after "dog" and after "the"
    assert found["looks"] == pytest.approx(100 * (0.6 + 0.6 + 0.2 + 0.4 + 0.6) / 5)
    assert found["function looks"] == pytest.approx(100 * (0.2 + 0.2 + 0.8 + 0.4) / 4)
    # "runs" and "in" are said fewer than five times
    assert found["looks least for"] == {"the": 40.0, "dog": 46.7}


@torch.no_grad()
def plain_falls(decoder, features, weights_of):
    """The fall of each content word when the places with the largest weights are deleted."""
    falls = []
    for words, image in zip(SAID, features):
        context, state = decoder.init_hidden_state(image.unsqueeze(0))
        for previous, word in zip([WORDS.index("<start>"), *words], words):
            previous = torch.tensor([[previous]])
            scores, attention, new_state = decoder.step(previous, state, context)
            if WORDS[word] not in gaze_room.FUNCTION_WORDS:
                changed = image.clone()
                changed[weights_of(attention.alpha[0, 0]).topk(2).indices] = image.mean(dim=0)
                context_then, _ = decoder.init_hidden_state(changed.unsqueeze(0))
                then, _, _ = decoder.step(previous, state, context_then)
                falls.append((scores.log_softmax(2) - then.log_softmax(2))[0, 0, word].item())
            state = new_state
    return falls


@pytest.mark.parametrize("grid", [0, 2, 7])
def test_the_places_deleted_are_those_that_the_model_weighs_most(grid, gaze):
    """Of the encoder's grid of 4 x 4, whatever grid attention sees."""
    decoders, features = [], torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))
    found = gaze(decoders.append, features, grid=grid)
    pool = models.pooling_matrix(4, grid) if grid else torch.eye(16)
    falls = plain_falls(decoders[0], features, lambda alpha: alpha @ pool)
    assert len(falls) == 5 and found["num_pixels"] == (grid or 4) ** 2
    assert found["fall"] == pytest.approx(sum(falls) / 5, rel=1e-4) and found["fall"] != 0


class Remembering:
    """A decoder whose state grows with every word, and has four dimensions."""

    def __init__(self, decoder):
        self.decoder = decoder

    def init_hidden_state(self, encoder_out):
        context, state = self.decoder.init_hidden_state(encoder_out)
        return context, tuple(s.unsqueeze(2) for s in state)  # (B, 1, 1, decoder_dim)

    def step(self, words, state, context):
        *output, new = self.decoder.step(words, tuple(s[:, :, -1] for s in state), context)
        return *output, tuple(torch.cat([s, n.unsqueeze(2)], dim=2) for s, n in zip(state, new))


def test_a_decoder_whose_state_grows_is_measured_like_any_other(gaze):
    assert gaze(wrap=Remembering) == gaze()


@pytest.mark.parametrize("said", [[[7], [6], [7], [6]], [[], [], [], []]])
def test_what_has_no_content_words_has_no_gaze_of_them(said, gaze):
    found = gaze(said=said)
    assert found.get("places") is None and "deletion ratio" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_words_of_the_list_are_function_words():
    assert {"a", "in", "the", "with", "is"} <= gaze_room.FUNCTION_WORDS
    assert not {"dog", "red", "runs", "two", "standing"} & gaze_room.FUNCTION_WORDS


def test_movement_is_the_share_of_attention_that_moves():
    class Decoder:  # looks at the place whose number the word before has
        def init_hidden_state(self, images):
            return images, (torch.zeros(len(images), 1, 1),)

        def step(self, said, state, images):
            alpha = torch.nn.functional.one_hot(said, 16).float()
            return torch.zeros(len(said), 1, 8), types.SimpleNamespace(alpha=alpha), state

    words = ["<pad>", "<start>", "<unk>", "<end>", "dog", "runs", "in", "the"]
    captioner = types.SimpleNamespace(
        decoder=Decoder(), words=words, word_map={w: i for i, w in enumerate(words)}, device="cpu"
    )
    said = [types.SimpleNamespace(words=w) for w in ([7, 4, 5], [7, 4, 6, 7, 5], [4])]
    assert gaze_room.measure_gaze(captioner, torch.randn(3, 16, 12), said)["movement"] == 0.5
