"""Tests of ``captioning/report/scenes.py``."""

import itertools
import json

import numpy as np
import pytest
import torch

import datasets
from captioning.data import shapes as shapes_room
from captioning.report import scenes


def test_judge_sees_wrong_objects_and_wrong_relations():
    scene = {
        "objects": [
            {"color": "red", "shape": "circle", "box": [0.1, 0.1, 0.3, 0.3]},
            {"color": "blue", "shape": "star", "box": [0.6, 0.12, 0.8, 0.32]},
        ]
    }
    for caption, count, shapes, objects, relation in (
        ("a red circle to the left of a large blue star", True, True, True, True),
        ("a blue star left of a red circle", True, True, True, False),
        (
            "a blue star below a red circle",
            True,
            True,
            True,
            False,
        ),  # by less than 5 % of the picture
        ("a red circle and a blue star", True, True, True, None),
        ("a red circle on the left", False, False, False, None),
        ("a red star left of a blue circle", True, True, False, False),
        ("a red circle left of a blue star and a red circle", False, False, False, True),
        ("a red circle and a blue circle", True, False, False, None),
        ("a circle left of a blue star", True, True, False, False),
        ("", False, False, False, None),
    ):
        assert scenes.judge_caption(scene, caption.split()) == {
            "count": count,
            "shapes": shapes,
            "objects": objects,
            "relation": relation,
        }, caption


def test_pointing_hits_what_a_word_names_and_chance_is_what_blind_pointing_gets():
    records, _ = datasets.shapes_records(60, 0, 0, seed=4, size=64)
    rng, side = np.random.default_rng(0), 8
    blind, named = [], 0
    for record in records:
        words = record.captions[0].split()
        sharp = np.zeros((len(words), side * side))
        for alpha, word in zip(sharp, words):
            named_by = (t for t in record.scene["objects"] if word in (t["color"], t["shape"]))
            for x0, y0, x1, y1 in (thing["box"] for thing in itertools.islice(named_by, 1)):
                alpha[int((y0 + y1) / 2 * side) * side + int((x0 + x1) / 2 * side)] = 1
        scores = scenes.pointing(record.scene, words, sharp)
        named += sum(
            word in shapes_room.SHAPE_COLORS or word in shapes_room.SHAPES for word in words
        )
        assert all(hit and 0 < chance < 1 for hit, chance in scores)
        for _ in range(30):
            blind += scenes.pointing(record.scene, words, rng.random(sharp.shape))
    assert named * 30 == len(blind)
    hits, chances = np.array(blind).mean(0)
    assert abs(hits - chances) < 0.02


def test_scenes_are_counted_by_hand():
    scene = {
        "objects": [
            {"shape": "circle", "color": "red", "box": [0.0, 0.0, 0.4, 0.4]},
            {"shape": "star", "color": "blue", "box": [0.6, 0.0, 1.0, 0.4]},
        ],
        "names": {"red": [0], "circle": [0], "blue": [1], "star": [1]},
    }
    captions = [
        "a red circle left of a blue star",
        "a red circle right of a blue star",
        "a red star",
        "a blue star",
    ]
    captions = [caption.split() for caption in captions]
    left_top = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1]]
    )  # a grid of 2 by 2, whose cells' centres lie at 1/4 and 3/4
    result = scenes.score_scenes(
        [scene] * 4, captions, [left_top.expand(len(words), -1) for words in captions]
    )
    assert (
        result["count"] == result["shapes"] == result["objects"] == 50 and result["relation"] == 50
    )
    # named: red circle blue star twice, red star, blue star; the circle is looked at, not the star
    assert result["pointing"] == pytest.approx(100 * 5 / 12) and result[
        "by chance"
    ] == pytest.approx(25)
    nothing = scenes.score_scenes([scene], [[]], [torch.zeros(0, 4)])
    assert nothing["relation"] is None and nothing["pointing"] is None and nothing["objects"] == 0
    assert json.dumps(nothing)


def test_attention_that_looks_nowhere_points_at_nothing():
    box = {"shape": "circle", "color": "red", "box": [0.0, 0.0, 0.5, 0.5]}
    scene = {"objects": [box], "names": {"circle": [0]}}
    even = scenes.score_scenes([scene], [["circle"]], [torch.full((1, 4), 0.25)])
    assert even["pointing"] is None and even["by chance"] == 25


def test_pointing_does_not_take_a_sentinel_for_a_place():
    scene = {"objects": [{"color": "red", "shape": "circle", "box": [0.5, 0.0, 1.0, 0.5]}]}
    alphas = torch.tensor([[0.1, 0.3, 0, 0, 0.6]])  # of 2 x 2 places, above on the right
    assert scenes.pointing(scene, ["circle"], alphas) == [(True, 0.25)]
