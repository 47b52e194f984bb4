"""Tests of ``captioning/report/bootstrap.py``."""

import numpy as np
import pytest

from captioning.report import bootstrap, metrics

WORDS = [f"w{i}" for i in range(40)]


def systems(seed, count, *errors):
    """References of one caption and, for each rate of errors, a system that makes as many."""
    rng = np.random.default_rng(seed)
    references = [[rng.choice(WORDS, 9).tolist()] for _ in range(count)]
    said = {}
    for label, rate in enumerate(errors):
        wrong = rng.random((count, 9)) < rate
        said[label] = [
            ["wrong" if w else word for word, w in zip(texts[0], row)]
            for texts, row in zip(references, wrong)
        ]
    own = {
        label: metrics.score_captions(references, captions, each=True)["each"]
        for label, captions in said.items()
    }
    return references, said, own


def test_the_differences_are_those_of_the_metrics_and_lie_in_their_intervals():
    references, said, own = systems(0, 60, 0.2, 0.3, 0.2)
    scores = [metrics.score_captions(references, captions) for captions in said.values()]
    found = bootstrap.differences(references, said, own)
    assert list(found) == [1, 2] and found == bootstrap.differences(references, said, own)
    for label, row in found.items():
        assert row.keys() == scores[0].keys()
        for metric, (difference, low, high) in row.items():
            expected = scores[label][metric] - scores[0][metric]
            assert difference == pytest.approx(expected) and low < difference < high
    assert found[1]["CIDEr"][2] < 0  # ten words of a hundred more are wrong, and it shows
    assert bootstrap.differences(references, {0: said[0], 1: said[0]}, {0: own[0], 1: own[0]}) == {
        1: dict.fromkeys(scores[0], [0, 0, 0])
    }


def test_the_interval_is_the_textbooks_where_the_metric_is_a_mean():
    references, said, own = systems(1, 400, 0.25, 0.3)
    _, low, high = bootstrap.differences(references, said, own)[1]["ROUGE-L"]
    gaps = np.subtract(own[1]["ROUGE-L"], own[0]["ROUGE-L"])
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    expected = [gaps.mean() - 1.96 * error, gaps.mean() + 1.96 * error]
    assert [low, high] == pytest.approx(expected, abs=error / 4)


def test_twenty_equal_pairs_of_systems_seldom_differ():
    """An interval of 95 % leaves 0 out in one of twenty; more than five are no chance."""
    wrong = 0
    for seed in range(20):
        _, low, high = bootstrap.differences(*systems(seed, 80, 0.3, 0.3))[1]["BLEU-4"]
        wrong += not low <= 0 <= high
    assert wrong <= 5


def test_a_metric_of_ones_own_is_compared_too_where_all_systems_have_it():
    references, said, own = systems(0, 40, 0.2, 0.3)
    for scores in own.values():
        scores["words"] = [float(i) for i in range(40)]
    own[0]["of one alone"] = [0.0] * 40
    found = bootstrap.differences(references, said, own)
    assert found[1]["words"] == [0, 0, 0] and "of one alone" not in found[1]
