"""Tests of ``captioning/model/schedules.py``."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from captioning.model.schedules import best_epoch


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_schedules_follow_their_formulas(update, minimum):
    def epsilon(name, *constants):
        schedule = models.Schedule(10**6, minimum, *constants)
        return models.scheduled_sampling_epsilon(name, update, schedule)

    assert epsilon("none") == 1
    assert epsilon("linear", 0.9, 1e-4) == pytest.approx(max(minimum, 0.9 - 1e-4 * update))
    assert epsilon("linear", 0.9) == pytest.approx(
        max(minimum, 0.9 - (0.9 - minimum) * update / 10**6)
    )
    assert epsilon("exponential", 0.999) == pytest.approx(max(minimum, 0.999**update))
    sigmoid = 2000 / (2000 + math.exp(update / 2000)) if update < 10**6 else 0
    assert epsilon("inverse_sigmoid", 2000.0) == pytest.approx(max(minimum, sigmoid), abs=1e-9)


@pytest.mark.parametrize("name", models.SCHEDULES)
@settings(deadline=None)
@given(updates=st.integers(1, 10**6), minimum=st.floats(0, 1))
def test_every_schedule_stays_between_minimum_and_one(name, updates, minimum):
    schedule = models.Schedule(updates, minimum)
    for update in (0, updates // 3, updates - 1, updates):
        assert minimum <= models.scheduled_sampling_epsilon(name, update, schedule) <= 1


@settings(deadline=None)
@given(
    st.sampled_from(["linear", "exponential", "inverse_sigmoid"]),
    st.integers(20, 10**6),
    st.floats(0, 0.95),
)
def test_left_to_themselves_schedules_reach_the_minimum_at_the_last_update(name, updates, minimum):
    schedule = models.Schedule(updates, minimum)
    values = [
        models.scheduled_sampling_epsilon(name, i, schedule)
        for i in (0, updates // 4, updates // 2, updates - 1, updates)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9 or name == "inverse_sigmoid"
    last = max(minimum, 0 if name == "linear" else 1e-3)
    assert values[-1] == pytest.approx(last, rel=1e-3, abs=1e-9)
    assert values[2] > values[-1]  # and not long before


def test_an_unknown_schedule_is_refused(fails):
    with fails("unknown schedule 'cosine'.*inverse_sigmoid"):
        models.scheduled_sampling_epsilon("cosine", 1, models.Schedule(10))


@pytest.mark.parametrize("scores, best", [([0, 0, 0, 0], 2), ([0, 7, 0, 7], 1), ([7, 8, 0, 9], 3)])
def test_of_equal_scores_the_lower_loss_is_best_and_then_the_first(scores, best):
    losses = [3.0, 2.5, 2.0, 2.5]
    pairs = zip(scores, losses)
    history = [{"BLEU-4": score, "val_nll": loss} for score, loss in pairs]
    assert best_epoch(history, "BLEU-4") is history[best]
    assert best_epoch([], "BLEU-4") is None
