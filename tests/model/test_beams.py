"""Tests of ``captioning/model/beams.py``."""

import inspect
import itertools
import math

import pytest
import torch
from conftest import make_decoder
from helpers import END, PAD, PAIRS, START, UNK, features, search

import caption
import eval as evaluation
import models
from captioning.model import beams
from captioning.run import machine


def forced_log_probs(decoders, encoder_outs, hypothesis, picture):
    """Teacher-forced log-probabilities of the words, and of <end> if it ended."""
    words = hypothesis.words + ([END] if hypothesis.ended else [])
    log_probs = []
    for decoder, out in zip(decoders, encoder_outs):
        output = decoder(
            out[picture][None], torch.tensor([[START, *words]]), [len(words)], torch.tensor([0])
        )
        log_probs.append(output.scores.log_softmax(1)[torch.arange(len(words)), words])
    return (torch.stack(log_probs).logsumexp(0) - math.log(len(decoders))).tolist()


def check_log_probs(hypothesis, forced):
    """The words' log-probabilities are the teacher-forced ones, and add up with <end>'s."""
    assert len(hypothesis.word_log_probs) == len(hypothesis.words)
    assert hypothesis.word_log_probs == pytest.approx(
        forced[: len(hypothesis.words)], rel=1e-4, abs=1e-5
    )
    assert hypothesis.log_prob == pytest.approx(sum(forced), rel=1e-4)


@pytest.mark.parametrize("length_penalty", [0, 2])
@pytest.mark.parametrize("decoder, attention", PAIRS)
def test_beam_one_is_greedy(decoder, attention, length_penalty, word_map):
    decoder, encoder_out = make_decoder(attention=attention, decoder=decoder), features(8)
    with torch.no_grad():
        decoder.fc.bias[END] -= 1
        for picture, (found,) in enumerate(
            search(
                decoder, encoder_out, word_map, beam_size=1, max_decode_steps=8,
                length_penalty=length_penalty,
            )
        ):  # fmt: skip
            context, state = decoder.init_hidden_state(encoder_out[picture][None])
            words, alphas, word = [], [], START
            while len(words) < 8:
                scores, looked, state = decoder.step(torch.tensor([[word]]), state, context)
                scores[..., [PAD, UNK, START]] = -math.inf
                word = scores.argmax().item()
                if word == END:
                    break
                words.append(word)
                alphas.append(looked.alpha[0, 0])
            assert found.words == words
            assert found.ended == (word == END) or len(words) == 8
            torch.testing.assert_close(
                found.alphas, torch.stack(alphas) if alphas else found.alphas[:0]
            )


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_the_tree_finds_every_caption_in_order(length_penalty, seed):
    word_map = {"<pad>": 0, "a": 1, "b": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
    decoder, out = make_decoder(6, seed=seed), features(2, seed=seed)
    captions = [words for n in range(4) for words in itertools.product((1, 2), repeat=n)]
    for picture in range(2):
        expected = []
        for words in captions:
            ids = [*words, 5]
            scores = decoder(
                out[picture][None], torch.tensor([[4, *ids]]), [len(ids)], torch.tensor([0])
            ).scores
            log_prob = scores.log_softmax(1)[torch.arange(len(ids)), ids].sum().item()
            expected.append((log_prob / len(ids) ** length_penalty, log_prob, list(words)))
        expected.sort(reverse=True)
        found = search(
            decoder,
            out,
            word_map,
            beam_size=24,
            n_best=15,
            length_penalty=length_penalty,
            max_decode_steps=3,
        )[picture]
        assert [h.words for h in found] == [words for _, _, words in expected]
        assert [h.score for h in found] == pytest.approx(
            [score for score, _, _ in expected], rel=1e-4
        )
        assert [h.log_prob for h in found] == pytest.approx(
            [log_prob for _, log_prob, _ in expected], rel=1e-4
        )
        if not length_penalty:  # stopping early is exact then
            assert (
                search(decoder, out, word_map, beam_size=24, max_decode_steps=3)[picture][0].words
                == expected[0][2]
            )


def repeats(words):
    threes = list(zip(words, words[1:], words[2:]))
    return len(set(threes)) < len(threes) or any(a == b for a, b in zip(words, words[1:]))


@pytest.mark.parametrize("seed", range(2))
def test_without_repeats_a_wide_beam_finds_all_captions_that_have_none(seed):
    word_map = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
    decoder, out = make_decoder(7, seed=seed), features(2, seed=seed)
    options = {"n_best": 1100, "beam_size": 3000, "max_decode_steps": 6}
    every = search(decoder, out, word_map, **options)
    for all_, found in zip(every, search(decoder, out, word_map, no_repeat=True, **options)):
        ended = [(h.words, h.log_prob) for h in all_]
        assert len(ended) == sum(3**n for n in range(7))
        expected = [pair for pair in ended if not repeats(pair[0])]
        assert 100 < len(expected) < 300 and [h.words for h in found] == [
            words for words, _ in expected
        ]
        assert [h.log_prob for h in found] == pytest.approx([p for _, p in expected], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 0.7}, {"n_best": 3}, {"max_decode_steps": 3}, {"max_decode_steps": 1}],
)
@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_hypotheses_are_what_they_say(attention, options, word_map):
    decoder, encoder_out = make_decoder(attention=attention, encoded_image_size=2), features(6)
    for beam_size in (3, 5):
        options = {"max_decode_steps": 12, "beam_size": beam_size, **options}
        for picture, hypotheses in enumerate(search(decoder, encoder_out, word_map, **options)):
            assert 1 <= len(hypotheses) <= options.get("n_best", 1)
            scores = [h.score for h in hypotheses]
            assert scores == sorted(scores, reverse=True)
            assert len({tuple(h.words) for h in hypotheses}) == len(hypotheses)
            for h in hypotheses:
                assert not {PAD, UNK, START, END} & set(h.words)
                assert len(h.words) <= options["max_decode_steps"]
                assert h.ended or len(h.words) == options["max_decode_steps"]
                check_log_probs(h, forced_log_probs([decoder], [encoder_out], h, picture))
                length = len(h.words) + h.ended
                assert h.score == pytest.approx(
                    h.log_prob / length ** options.get("length_penalty", 0), rel=1e-4
                )
                assert h.alphas.shape == (len(h.words), 4 + (attention == "adaptive"))
                forced = decoder(
                    encoder_out[picture][None],
                    torch.tensor([[START, *h.words, END]]),
                    [len(h.words) + 1],
                    torch.tensor([0]),
                ).alphas[0, : len(h.words)]
                torch.testing.assert_close(h.alphas, forced, rtol=1e-4, atol=1e-5)


def test_without_repeats_a_narrow_beam_repeats_nothing(word_map):
    decoder, encoder_out = make_decoder(scale=5.0), features(6)
    options = {"beam_size": 3, "n_best": 3, "max_decode_steps": 30}
    plain = sum(search(decoder, encoder_out, word_map, **options), [])
    found = sum(search(decoder, encoder_out, word_map, no_repeat=True, **options), [])
    assert any(repeats(h.words) for h in plain) and max(len(h.words) for h in found) > 5
    assert not any(repeats(h.words) for h in found)


def test_letters_of_scripts_without_spaces_may_be_doubled():
    """妈妈 (mother) is one word of two letters, each of which is a word of the word map."""
    seqs = torch.tensor([[[4, 1], [1, 2]]])  # (B, K, t)
    allowed = lambda letters: beams.ban_repeats(torch.zeros(1, 2, 5), seqs, torch.tensor(letters))
    none = torch.empty(0, dtype=torch.int64)
    assert (beams.ban_repeats(torch.zeros(1, 2, 5), seqs, none) == -math.inf).sum() == 2
    found = allowed([1])[0] == -math.inf  # (K, vocab_size)
    assert found.nonzero().tolist() == [[0, 0], [1, 2]]  # <pad> and the last word


def test_a_batch_is_searched_as_its_pictures_alone(word_map):
    decoder, encoder_out = make_decoder(seed=4), features(7)
    options = {"beam_size": 4, "n_best": 2, "length_penalty": 0.7, "max_decode_steps": 12}
    together = search(decoder, encoder_out, word_map, **options)
    for picture, found in enumerate(together):
        alone = search(decoder, encoder_out[picture : picture + 1], word_map, **options)[0]
        assert [h.words for h in found] == [h.words for h in alone]
        assert [h.log_prob for h in found] == pytest.approx([h.log_prob for h in alone], rel=1e-4)
        assert [h.ended for h in found] == [h.ended for h in alone]
    assert len({len(found[0].words) for found in together}) > 1  # they do not all end together


def test_a_search_from_python_is_the_prompts():
    flags = vars(evaluation.get_args_parser().parse_args([]))
    parameters = inspect.signature(models.beam_search).parameters.items()
    shared = {name: p.default for name, p in parameters if name in flags}
    del shared["consensus"], shared["word_map"]  # which are objects here
    assert shared.keys() == {"beam_size", "length_penalty", "max_decode_steps", "no_repeat"}
    assert shared == {name: flags[name] for name in shared} | {"beam_size": flags["beam_size"][0]}
    flags = vars(caption.get_args_parser().parse_args(["--img", "photo.jpg"]))
    shared["no_repeat"] = (
        inspect.signature(models.Captioner.__call__).parameters["no_repeat"].default
    )
    assert shared == {name: flags[name] for name in shared}


@pytest.mark.parametrize("beam_size, n_best", [(1, 1), (3, 3), (5, 2), (1, 2), (2, 7)])
def test_a_decoder_that_never_ends_returns_what_it_has(beam_size, n_best, word_map):
    decoder, encoder_out = make_decoder(), features(2)
    with torch.no_grad():
        decoder.fc.bias[END] = -1e9
    for picture, found in enumerate(
        search(
            decoder,
            encoder_out,
            word_map,
            beam_size=beam_size,
            n_best=n_best,
            max_decode_steps=5,
            length_penalty=0.5,
        )
    ):
        assert len(found) == min(beam_size, n_best)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for h in found:
            assert len(h.words) == 5 and not h.ended and h.alphas.shape == (5, 9)
            check_log_probs(h, forced_log_probs([decoder], [encoder_out], h, picture))
            assert h.score == pytest.approx(h.log_prob / 5**0.5, rel=1e-5)


def test_a_decoder_that_only_ends_says_nothing(word_map):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.bias[END] = 1e4
    for (found,) in search(decoder, features(2), word_map, beam_size=3):
        assert found.words == [] and found.ended and found.alphas.shape == (0, 9)
        assert found.log_prob == pytest.approx(0, abs=1e-5)


def test_forbidden_words_are_never_said_however_likely(word_map):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.bias[[PAD, UNK, START]] = 20
    for found in search(decoder, features(4), word_map, beam_size=3, n_best=3, max_decode_steps=6):
        assert all(
            not {PAD, UNK, START} & set(h.words) and math.isfinite(h.log_prob) for h in found
        )


def test_an_ensemble_votes(word_map):
    one, two = (
        make_decoder(seed=1),
        make_decoder(seed=2, attention="mean", decoder="gru", encoder_dim=4),
    )
    outs = [features(5), features(5, side=2, encoder_dim=4)]
    options = {"beam_size": 3, "max_decode_steps": 10, "length_penalty": 0}
    alone = search(one, outs[0], word_map, **options)
    twice = models.beam_search([one, one], [outs[0], outs[0]], word_map, **options)
    for (a,), (b,) in zip(alone, twice):
        assert a.words == b.words and a.log_prob == pytest.approx(b.log_prob, rel=1e-4)
        torch.testing.assert_close(a.alphas, b.alphas)
    mixed = models.beam_search([one, two], outs, word_map, **options)
    for picture, (found,) in enumerate(mixed):
        check_log_probs(found, forced_log_probs([one, two], outs, found, picture))
        assert found.alphas.shape == (len(found.words), 9)
    assert [f[0].words for f in mixed] != [f[0].words for f in alone]


def test_sampled_locations_are_the_seeds(word_map):
    decoder, encoder_out = make_decoder(attention="hard"), features(6)
    decoder.sample_location = True

    def captions(seed):
        machine.set_seed(seed)
        return [
            found[0].log_prob
            for found in search(decoder, encoder_out, word_map, max_decode_steps=10)
        ]

    assert captions(1) == captions(1)
    assert captions(1) != captions(2)
    decoder.sample_location = False
    assert captions(1) == captions(2)


def test_without_alphas_the_captions_are_the_same(word_map):
    decoder = make_decoder()
    options = {"beam_size": 3, "max_decode_steps": 8}
    for (a,), (b,) in zip(
        search(decoder, features(), word_map, **options),
        search(decoder, features(), word_map, with_alphas=False, **options),
    ):
        assert a[:3] == b[:3] and b.alphas is None


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_split_is_captioned_whole_and_in_order(best_checkpoint, batch_size):
    captioner = models.load_captioner(best_checkpoint)
    out = torch.randn(5, 4, 512)
    options = {"beam_size": 2, "max_decode_steps": 6, "length_penalty": 0.7}
    found = models.caption_split([captioner], [out.half()], batch_size=batch_size, **options)
    expected = search(captioner.decoder, out.half().float(), captioner.word_map, **options)
    assert [f[0].words for f in found] == [f[0].words for f in expected]


@pytest.mark.parametrize("option", ["beam_size", "n_best"])
def test_a_search_for_nothing_is_one_line(option, word_map, fails):
    with fails("beam_size and n_best: expected 1 or more, found 0"):
        search(make_decoder(), features(), word_map, **{option: 0})


def test_the_gaze_of_an_ensemble_is_the_mean_of_its_members(word_map):
    decoders, images = [make_decoder(seed=seed) for seed in (1, 2)], features(3)
    found = models.beam_search(decoders, [images] * 2, word_map, beam_size=1, max_decode_steps=4)
    alphas = []
    for decoder in decoders:
        context, state = decoder.init_hidden_state(images)
        _, attention, _ = decoder.step(torch.full((3, 1), START), state, context)
        alphas.append(attention.alpha[:, 0])
    said = [i for i, (best,) in enumerate(found) if best.words]
    assert said
    for i in said:
        torch.testing.assert_close(found[i][0].alphas[0], (alphas[0][i] + alphas[1][i]) / 2)


def test_what_is_sent_of_a_hypothesis_does_not_grow_with_the_batch(word_map):
    """The processes of eval.py send each other pickles, and a view holds all of its tensor."""
    sizes = []
    for images in (1, 8):
        found = models.beam_search([make_decoder()], [features(images)], word_map, beam_size=2)
        sizes.append(found[0][0].alphas.untyped_storage().nbytes())
    assert sizes[0] == sizes[1] == found[0][0].alphas.nbytes
