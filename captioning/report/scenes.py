"""Whether captions and attention are true, where it is known what pictures show."""

import collections
import itertools
import math

import numpy as np

from captioning.data.shapes import PHRASES, SHAPE_COLORS, SHAPES
from captioning.model.grid import split_sentinel
from captioning.report.metrics import percentage


def score_scenes(scenes, captions, alphas):
    """How far captions and attention are true, where it is known what the pictures show.

    :param scenes: list of scenes (see ``datasets.shapes_records``)
    :param captions: list of lists of words
    :param alphas: list of float tensors (num_words, num_pixels), or None if there are none
    :return: dict of percentages: captions that name as many shapes as there are ("count"), the
        right ones ("shapes"), in the right colours too ("objects"); "relation" (true ones among
        captions that state one), "pointing" (words whose attention peaks in the box of what they
        name; None for even attention) and "by chance" (the same for a peak anywhere)
    """
    verdicts = [judge_caption(scene, words) for scene, words in zip(scenes, captions)]
    looks = list(itertools.chain(*map(pointing, scenes, captions, alphas or [])))
    shares = {
        name: percentage([verdict[name] for verdict in verdicts if verdict[name] is not None])
        for name in ("count", "shapes", "objects", "relation")
    }
    even = all((alpha == alpha[:, :1]).all() for alpha in alphas or [])  # as without attention
    return shares | {
        "pointing": None if even else percentage([hit for hit, _ in looks]),
        "by chance": percentage([chance for _, chance in looks]),
    }


def judge_caption(scene, words):
    """Hold a caption against the scene that it should describe.

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :return: dict of verdicts. ``count``: whether as many shapes are mentioned as there are;
        ``shapes``: whether they are those of the scene, each as often as it is there; ``objects``:
        the same with the colour just before each; ``relation``: None if the caption puts no
        mentioned shape left of, right of, above or below the next one; else whether all it says so
        is true by at least 5 % of the picture (it is not, of a shape that is not there)
    """
    mentions = [
        (i, (words[i - 1] if i and words[i - 1] in SHAPE_COLORS else None, word))
        for i, word in enumerate(words)
        if word in SHAPES
    ]
    objects = {(thing["color"], thing["shape"]): thing["box"] for thing in scene["objects"]}
    stated = []
    for (i, subject), (j, other) in itertools.pairwise(mentions):
        relations = [word for word in words[i + 1 : j] if word in PHRASES]
        stated += [_is_true(word, objects.get(subject), objects.get(other)) for word in relations]
    said = collections.Counter(mention for _, mention in mentions)
    shapes = collections.Counter(shape for _, (_, shape) in mentions)
    return {
        "count": len(mentions) == len(objects),
        "shapes": shapes == collections.Counter(shape for _, shape in objects),
        "objects": said == collections.Counter(list(objects)),
        "relation": all(stated) if stated else None,
    }


def _is_true(relation, box, other):
    if box is None or other is None:
        return False
    axis = 0 if relation in ("left", "right") else 1
    difference = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
    return (difference if relation in ("right", "below") else -difference) >= 0.05


def pointing(scene, words, alphas):
    """For each word that names an object of the scene: did attention peak on what it names?

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :param alphas: attention weights, float (num_words, num_pixels), pixels row by row
    :return: list of (hit, chance), one for each such word: whether the centre of the peak's cell
        lies in a box of what the word names, and the share of all cells whose centre does
    """
    side = math.isqrt(alphas.shape[1])
    y, x = (np.indices((side, side)).reshape(2, -1) + 0.5) / side  # centres of the cells
    scores = []
    for word, alpha in zip(words, np.asarray(split_sentinel(alphas)[0])):
        boxes = [t["box"] for t in scene["objects"] if word in (t["color"], t["shape"])]
        if boxes:
            inside = np.any(
                [(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) for x0, y0, x1, y1 in boxes], axis=0
            )
            scores.append((bool(inside[np.argmax(alpha)]), float(inside.mean())))
    return scores
