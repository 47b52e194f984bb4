"""Tests of ``captioning/data/shapes.py``."""

import hashlib

import numpy as np
from helpers import contents

import datasets
from captioning.data import shapes as shapes_room
from captioning.report import scenes


def test_scenes_are_told_truly():
    records, _ = datasets.shapes_records(150, 1, 1, seed=3, size=64)
    assert {len(r.scene["objects"]) for r in records} == {1, 2, 3}
    for record in records:
        assert len(record.captions) == 5
        for caption in record.captions:
            words = caption.split()
            relation = True if len(record.scene["objects"]) > 1 else None
            assert scenes.judge_caption(record.scene, words) == {
                "count": True,
                "shapes": True,
                "objects": True,
                "relation": relation,
            }, caption
        boxes = np.array([thing["box"] for thing in record.scene["objects"]])
        assert (boxes >= 0).all() and (boxes <= 1).all()


def test_boxes_are_where_the_colours_are():
    records, _ = datasets.shapes_records(40, 0, 0, seed=5, size=96)
    for record in records:
        image = np.array(record.image(96)).astype(int)
        for thing in record.scene["objects"][-1:]:  # the last is drawn over the others
            near = np.abs(image - shapes_room.SHAPE_COLORS[thing["color"]]).max(2) <= 10
            if sum(other["color"] == thing["color"] for other in record.scene["objects"]) == 1:
                ys, xs = np.nonzero(near)
                seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 96
                assert np.abs(seen - thing["box"]).max() < 0.04, record


def test_a_generated_picture_depends_on_seed_split_and_number_alone():
    few = contents(datasets.shapes_records(3, 2, 2, seed=6, size=32)[0])
    many = {
        entry[0]: entry for entry in contents(datasets.shapes_records(8, 4, 5, seed=6, size=32)[0])
    }
    assert few == [many[entry[0]] for entry in few]
    assert few != contents(datasets.shapes_records(3, 2, 2, seed=7, size=32)[0])
    assert len({pixels for *_, pixels in many.values()}) == len(many)


def test_the_shapes_are_the_same_as_ever():
    digest = hashlib.sha256()
    for r in datasets.shapes_records(12, 2, 2, seed=0, size=64)[0]:
        digest.update("\n".join([r.name, *r.captions]).encode() + np.asarray(r.image(64)).tobytes())
    assert digest.hexdigest().startswith("e70f5e309730e38d0487dc301a8b14dc")
