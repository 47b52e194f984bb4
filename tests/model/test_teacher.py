"""Tests of ``captioning/model/teacher.py``."""

import itertools

import pytest
import torch
from helpers import CAPTIONS, LENGTHS, PICTURES, features

import models


@pytest.mark.parametrize("sentinel", [0, 1], ids=["places", "and_sentinel"])
@pytest.mark.parametrize(("side", "scale"), [(3, 1), (2, 1), (3, 20), (2, 200)])
def test_attention_teacher_is_a_plain_loop_over_words_and_places(side, scale, sentinel):
    torch.manual_seed(0)
    teacher, encoder_out = models.AttentionTeacher(6, 10), scale * features(side=side)
    alphas = torch.randn(4, 6, 9 + sentinel).softmax(2)  # of a grid of 3 x 3
    pool = models.pooling_matrix(side, 3) if side != 3 else torch.eye(9)
    expected = 0
    for row, length in enumerate(LENGTHS):
        guesses = [torch.zeros(side**2 + sentinel)]  # before the first word, and after <end>
        for previous, target in itertools.pairwise(CAPTIONS[row, : length + 1]):
            seen = teacher.place_words(encoder_out[PICTURES[row]]).log_softmax(1)  # (n, words)
            usual = teacher.next_words(previous).log_softmax(0)
            both = torch.cat([seen + usual, usual.expand(sentinel, -1)])  # which sees nothing
            guesses.append(both[:, target] - both.logsumexp(1))
        guesses.append(guesses[0])
        for step in range(length):
            before, now, after = guesses[step : step + 3]
            weights = alphas[row, step]
            place = torch.cat([weights[:9] @ pool, weights[9:]]).log()  # (n,), or n + 1
            expected = expected - (place + now + (before + after) / 2).logsumexp(0)
    torch.testing.assert_close(teacher(encoder_out, alphas, CAPTIONS, PICTURES), expected)


def test_words_that_follow_from_language_alone_draw_attention_nowhere():
    teacher = models.AttentionTeacher(6, 10)
    alphas = torch.full((4, 6, 9), 1 / 9, requires_grad=True)
    nothing_seen = features()[:, :1].expand(-1, 9, -1)  # the same at every place
    (drawn,) = torch.autograd.grad(teacher(nothing_seen, alphas, CAPTIONS, PICTURES), alphas)
    torch.testing.assert_close(drawn, drawn[..., :1].expand(-1, -1, 9))
