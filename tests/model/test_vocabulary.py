"""Tests of ``captioning/model/vocabulary.py``."""

import functools

import pytest
import torch
from conftest import make_decoder

import models
from captioning.model.vocabulary import take_over, with_words, word_rows

KNOWN = {"<pad>": 0, "a": 1, "dog": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
OTHER = {"<pad>": 0, "cat": 1, "a": 2, "sat": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "dog": 7}


@pytest.mark.parametrize("name", models.DECODERS)
def test_every_decoder_goes_on_with_other_words(name):
    """What it says of the words that it knew does not change, whatever their numbers."""
    build = functools.partial(make_decoder, decoder=name)
    before, after = build(len(KNOWN), seed=0), build(len(OTHER), seed=1)
    assert len(word_rows(build)) >= 2  # of the words that are read, and of those that are said
    take_over(after, before.state_dict(), KNOWN, OTHER, build)
    encoder_out = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    said = torch.tensor([[1, 2, 2], [2, 1, 1]])  # of KNOWN: a dog dog; dog a a
    others = torch.tensor([0, 2, 7, 4, 5, 6])[said]
    scores = []
    for decoder, words in ((before, said), (after, others)):
        context, state = decoder.init_hidden_state(encoder_out)
        for t in range(words.shape[1]):
            score, _, state = decoder.step(words[:, t : t + 1], state, context)
        scores.append(score[:, 0])  # (2, vocab_size)
    ids = [OTHER[word] for word in KNOWN]
    torch.testing.assert_close(scores[1][:, ids], scores[0])


def test_rows_of_new_words_stay_as_they_are():
    build = functools.partial(torch.nn.Embedding, embedding_dim=3)
    fresh, state = build(len(OTHER)).state_dict(), build(len(KNOWN)).state_dict()
    rows = with_words(state, KNOWN, fresh, OTHER, build)["weight"]
    assert torch.equal(rows[[OTHER["cat"], OTHER["sat"]]], fresh["weight"][[1, 3]])
    assert torch.equal(rows[[OTHER["dog"], OTHER["a"]]], state["weight"][[2, 1]])


class WordsLast(torch.nn.Module):
    """Words are in the second dimension of a tensor."""

    def __init__(self, count):
        super().__init__()
        self.out = torch.nn.Parameter(torch.randn(3, count))


def test_words_in_another_dimension_are_kept_or_refused(fails):
    """Rows of something else were taken for words, and lost."""
    state, fresh = WordsLast(4).state_dict(), WordsLast(4).state_dict()
    assert torch.equal(with_words(state, KNOWN, fresh, dict(KNOWN), WordsLast)["out"], state["out"])
    with fails("out should have them in its first dimension"):
        with_words(state, KNOWN, fresh, OTHER, WordsLast)
