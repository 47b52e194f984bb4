"""Tests of ``captioning/model/cider.py``."""

import json

import pytest
from helpers import HYPOTHESES, REFERENCES, as_coco

from captioning.model import cider


def test_reward_is_the_published_cider():
    from pycocoevalcap.cider.cider import Cider

    scorer = cider.CiderD(REFERENCES, end=None)
    rewards = [scorer(i, words) for i, words in enumerate(HYPOTHESES)]
    assert rewards == pytest.approx(list(Cider().compute_score(*as_coco())[1]))
    with_end = cider.CiderD(REFERENCES)
    assert (
        with_end(0, REFERENCES[0][0])
        > with_end(0, REFERENCES[0][0][:-1])
        > with_end(0, HYPOTHESES[2])
        >= 0
    )
    assert with_end(0, []) >= 0 and json.dumps(rewards)
