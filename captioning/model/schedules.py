"""What changes as a training goes on: the true word's probability, the learning rate, patience."""

import math
from typing import NamedTuple

from captioning.run.messages import look_up


def scheduled_sampling_epsilon(name, update, schedule):
    """Probability of feeding the ground truth at an update (Bengio et al. 2015, section 2.4).

    :param name: a key of ``SCHEDULES``
    :return: float in [schedule.minimum, 1]
    """
    epsilon = look_up(SCHEDULES, name, "schedule")(update / schedule.updates, schedule)
    return min(1.0, max(schedule.minimum, epsilon))


class Schedule(NamedTuple):
    """The constants of a schedule; None: such that ``minimum`` is reached at the last update."""

    updates: int  # updates of the whole training
    minimum: float = 0.0  # the probability never falls below this
    k: float | None = None  # of the formula
    slope: float | None = None  # linear only: fall per update


def linear(progress, schedule):
    """k - slope * i at update i."""
    k = 1.0 if schedule.k is None else schedule.k
    slope = (k - schedule.minimum) / schedule.updates if schedule.slope is None else schedule.slope
    return k - slope * progress * schedule.updates


def exponential(progress, schedule):
    """k^i at update i, with k < 1."""
    k = max(schedule.minimum, 1e-3) ** (1 / schedule.updates) if schedule.k is None else schedule.k
    return k ** (progress * schedule.updates)


def inverse_sigmoid(progress, schedule):
    """k / (k + exp(i / k)) at update i, with k >= 1."""
    from scipy.special import lambertw  # solves x * exp(x) = y

    k, updates = schedule.k, schedule.updates
    if k is None:
        last = min(max(schedule.minimum, 1e-3), 0.99)
        k = updates / lambertw(updates * (1 - last) / last).real.item()
    return k / (k + math.exp(min(progress * updates / k, 700)))  # e^700: near the largest float


# To add a schedule, add an entry: a function of the training's progress, from 0 to 1.
SCHEDULES = {
    "none": lambda progress, schedule: 1.0,
    "linear": linear,
    "exponential": exponential,
    "inverse_sigmoid": inverse_sigmoid,
}


def of_this_data(history):
    """The epochs since a run's data last got more pictures or fewer: scores of others say less."""
    return [record for record in history if not record.get("of_other_data")]


def best_epoch(history, metric):
    """The best epoch's record, of this data if there is one; None of no epochs.

    Of equal scores, such as a BLEU-4 of 0, the lower validation loss decides, then the first.
    """
    records = of_this_data(history) or history
    rank = lambda record: (record[metric], -record.get("val_nll", 0))
    return max(records, key=rank, default=None)


def epochs_without_gain(records, metric):
    """How many epochs ago the best one was; of no epochs 0."""
    return len(records) - 1 - records.index(best_epoch(records, metric)) if records else 0


def warmup_updates(config):
    """Updates of a rising learning rate: those of ``--warmup``, but at most a tenth of the run."""
    return min(config["warmup"], config["total_updates"] // 10)


def is_patient(config, history, patience):
    """Whether the best epoch, or the warm-up's end, is fewer than ``patience`` epochs ago."""
    warm = sum(record["update"] > warmup_updates(config) for record in history)
    return min(epochs_without_gain(of_this_data(history), config["metric"]), warm) < patience


def learning_rate_factor(config, update, history):
    """Share of the peak learning rate at an update; follows from the log, so nothing is resumed."""
    warmup = warmup_updates(config)
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / max(1, config["total_updates"] - warmup)
    schedule = look_up(LEARNING_RATES, config["lr_schedule"], "lr_schedule")
    return schedule(min(1.0, progress), config, history)


def plateau(progress, config, history):
    """x 0.8 after every 2 epochs without a better score."""
    pasts = (history[: n + 1] for n in range(len(history)))
    # reductions remain when the data changes: each epoch is held against those of its own
    mark = lambda record: record.get("of_other_data")
    alike = ([record for record in past if mark(record) == mark(past[-1])] for past in pasts)
    stale = [epochs_without_gain(past, config["metric"]) for past in alike]
    return 0.8 ** sum(n > 0 and n % 2 == 0 for n in stale)


# To add one, add an entry: a function of the progress since the warm-up, from 0 to 1, the run's
# configuration and its epochs' records.
LEARNING_RATES = {
    "cosine": lambda progress, *_: 0.5 * (1 + math.cos(math.pi * progress)),
    "plateau": plateau,
    "constant": lambda *_: 1.0,
}
