"""Tests of ``captioning/model/consensus.py``."""

import math

import numpy as np
import pytest
import torch
from conftest import make_decoder
from helpers import features, search

import models
from captioning.model import cider as cider_room


class Described:
    """Stands for a captioner and its data: twelve pictures with two captions each."""

    def __init__(self, word_map):
        rng = np.random.default_rng(0)
        self.words = sorted(word_map, key=word_map.get)
        self.references = [
            [[self.words[i] for i in rng.integers(1, 7, 4)] for _ in range(2)] for _ in range(12)
        ]

    def text(self, hypothesis):
        return [self.words[word] for word in hypothesis.words]


def test_a_consensus_adds_what_people_said_of_the_nearest_pictures(word_map):
    decoders, outs = [make_decoder(seed=i) for i in (2, 3)], [features(3, seed=i) for i in (2, 3)]
    data, generator = Described(word_map), torch.Generator().manual_seed(0)
    means = [torch.randn(12, 6, generator=generator) + 3 for _ in decoders]
    means[0][:, 2] = 0.0  # a channel that never stirs in training, and does in these pictures
    consensus = models.Consensus([data] * 2, data.references, means, weight=2.0)
    options = {"beam_size": 6, "length_penalty": 1.0, "max_decode_steps": 8}
    plain = models.beam_search(decoders, outs, word_map, n_best=6, **options)
    found = models.beam_search(decoders, outs, word_map, n_best=4, consensus=consensus, **options)

    cider = cider_room.CiderD(data.references)
    changed = 0
    for picture, hypotheses in enumerate(found):
        cosines = np.zeros(12)
        for mean, out in zip(means, outs):
            known, mine = mean.numpy(), out[picture].mean(0).numpy()
            spread = np.where(known.std(0) > 0, known.std(0), np.inf)
            known, mine = (known - known.mean(0)) / spread, (mine - known.mean(0)) / spread
            cosines += known @ mine / np.linalg.norm(known, axis=1) / np.linalg.norm(mine) / 2
        nearest = np.argsort(-cosines)[:10]
        shares = np.exp(cosines[nearest] / 0.1) / np.exp(cosines[nearest] / 0.1).sum()
        expected = {}
        for h in plain[picture]:
            agreement = sum(
                share * cider(i, data.text(h), h.ended) for share, i in zip(shares, nearest)
            )
            expected[tuple(h.words)] = h.score + 2.0 * agreement
        order = sorted(expected, key=expected.get, reverse=True)[:4]
        assert [tuple(h.words) for h in hypotheses] == order
        assert [h.score for h in hypotheses] == pytest.approx(
            [expected[words] for words in order], rel=1e-4
        )
    ranked = consensus(outs, plain)
    with torch.autocast("cpu", torch.bfloat16):  # which cannot tell near neighbours apart
        assert consensus(outs, plain) == ranked
        changed += order[0] != tuple(plain[picture][0].words)
        alphas = {tuple(h.words): h.alphas for h in plain[picture]}
        assert all(torch.equal(h.alphas, alphas[tuple(h.words)]) for h in hypotheses)
    assert changed


def test_a_consensus_needs_only_one_training_picture(word_map):
    data = Described(word_map)
    consensus = models.Consensus([data], data.references[:1], [torch.ones(1, 6)], weight=1.0)
    found = search(
        make_decoder(), features(2), word_map, beam_size=3, max_decode_steps=5, consensus=consensus
    )
    assert [len(hypotheses) for hypotheses in found] == [1, 1] and all(
        math.isfinite(h.score) for (h,) in found
    )
