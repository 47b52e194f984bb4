"""Is one system better than another, or are the pictures such? The paired bootstrap."""

import numpy as np

from captioning.report.metrics import bleu, bleu_counts
from captioning.run.messages import counted, note

FACTS = {"interval": 0.95, "resamples": 1000, "seed": 0}


def differences(references, captions, own):
    """How much each system's metrics are above the first one's, with 95 % intervals.

    Pictures are drawn with replacement, as many as there are, the same ones for all systems (Koehn
    2004, "Statistical significance tests for machine translation evaluation"). BLEU is the
    corpus's, from the counts of the pictures drawn. All other metrics are means of the pictures'
    own; CIDEr's weights of words stay.

    :param references: list (pictures) of lists (captions) of lists of words
    :param captions: dict: for each system a list (pictures) of lists of words
    :param own: dict: for each system a dict of lists, the pictures' own scores
    :return: dict: for each system but the first one, metric to [difference, low, high]
    """
    labels, count = list(captions), len(references)
    if count < 30:
        note(
            f"{counted(count, 'picture')}: too few to tell how far pictures differ, so the "
            "differences' 95 % intervals are too narrow"
        )
    names = [f"BLEU-{n}" for n in range(1, 5)]
    means = dict.fromkeys(["METEOR", "ROUGE-L", "CIDEr", *own[labels[0]]])
    means = [m for m in means if m not in names and all(m in own[label] for label in labels)]
    names += means
    parts = []
    for label in labels:
        counts = bleu_counts(references, captions[label])  # (num_pictures, 10)
        parts.append(np.column_stack([counts, *(own[label][name] for name in means)]))
    parts = np.stack(parts, axis=1)  # (num_pictures, systems, 10 + metrics)
    flat, generator = parts.reshape(count, -1), np.random.default_rng(FACTS["seed"])
    draws = (np.bincount(generator.integers(count, size=count)) for _ in range(FACTS["resamples"]))
    sums = [np.ones(count) @ flat, *(draw @ flat[: len(draw)] for draw in draws)]
    sums = np.stack(sums).reshape(-1, *parts.shape[1:])  # (1 + resamples, systems, ...)
    figures = np.concatenate([bleu(sums[..., :10]), sums[..., 10:] / count], axis=2)
    above = figures[:, 1:] - figures[:, :1]  # (1 + resamples, systems - 1, metrics)
    outside = (1 - FACTS["interval"]) / 2  # on either side
    low, high = np.quantile(above[1:], (outside, 1 - outside), axis=0)
    triples = np.stack([above[0], low, high], axis=2)  # (systems - 1, metrics, 3)
    return {label: dict(zip(names, rows.tolist())) for label, rows in zip(labels[1:], triples)}
