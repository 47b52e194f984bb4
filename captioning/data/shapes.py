"""The data set that needs no download: drawn scenes of coloured shapes, and what they show."""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from captioning.data.records import SPLITS, Record

SHAPES = ("circle", "square", "triangle", "star")
SHAPE_COLORS = {"red": (214, 34, 38), "green": (28, 152, 58), "blue": (32, 74, 214)}
SHAPE_COLORS |= {"yellow": (250, 212, 22), "white": (250, 250, 250), "black": (18, 18, 20)}
BACKGROUNDS = ("plain", "shaded", "striped", "speckled")
PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_INVERSE = {"left": "right", "above": "below"}

_PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)

_TINTS = ("98a0aa", "b0a090", "94a698", "aa98a8", "92a0b8", "a6a6a0")
_MARGIN = 0.03


def shapes_records(num_train=4000, num_val=200, num_test=300, seed=0, size=256):
    """Generated scenes of one to three coloured shapes, with captions that say what stands where.

    A picture depends on the seed, its split and its number alone. Its ``scene`` holds ``objects``,
    each with ``shape``, ``color``, ``size`` and ``box`` [x0, y0, x1, y1] in fractions of the
    picture; and ``background``.

    :param size: side of the pictures in pixels
    :return: list of :class:`Record`, list of notes for the user (empty)
    """
    records = []
    for split, number in zip(SPLITS, (num_train, num_val, num_test)):
        for i in range(number):
            key = f"{seed}/{split}/{i}"
            scene, outlines, captions = _make_scene(random.Random(key))
            image = functools.partial(_draw_scene, scene, outlines, key, size)
            records.append(Record(f"shapes_{split}_{i:05d}.png", split, captions, image, scene))
    return records, []


def is_scene(scene):
    """Whether a value has the layout of a scene (see :func:`shapes_records`)."""
    things = scene["objects"]
    are_known = all(t["color"] in SHAPE_COLORS and t["shape"] in SHAPES for t in things)
    return are_known and all(len(t["box"]) == 4 and sum(t["box"]) >= 0 for t in things)


def _make_scene(rng):
    """Draw by lot what a scene shows: the scene, its objects' outlines in fractions, captions."""
    number = rng.choices((1, 2, 3), (30, 60, 10))[0]
    # each colour and each shape at most once, so that each of these words names one object
    looks = list(zip(rng.sample(list(SHAPE_COLORS), number), rng.sample(SHAPES, number)))
    sizes = [rng.choice(("small", "large")) for _ in looks]
    small, large = ((0.22, 0.27), (0.34, 0.42)) if number < 3 else ((0.18, 0.22), (0.26, 0.31))
    sides = [rng.uniform(*(small if size == "small" else large)) for size in sizes]
    relation = rng.choice(("left", "above"))  # of the first object to the second
    place = (rng.randrange(3), rng.randrange(3))
    if number == 1:
        reach = 1 - 2 * _MARGIN - sides[0]
        middle = (0.5 * p + rng.uniform(-0.06, 0.06) * (p == 1) for p in place)
        centers = [tuple(_MARGIN + sides[0] / 2 + reach * m for m in middle)]
    else:
        centers = _place_several(rng, sides, relation == "above")

    objects, outlines = [], []
    for (color, shape), size, side, center in zip(looks, sizes, sides, centers):
        corners = _outline(shape, rng.uniform(-0.2, 0.2))
        outlines.append([(center[0] + side * x, center[1] + side * y) for x, y in corners])
        xs, ys = zip(*outlines[-1])
        box = [round(value, 5) for value in (min(xs), min(ys), max(xs), max(ys))]
        objects.append({"shape": shape, "color": color, "size": size, "box": box})
    scene = {"objects": objects, "background": rng.choice(BACKGROUNDS)}
    if number == 1:
        return scene, outlines, _describe_one(rng, scene, place)
    return scene, outlines, _describe_several(rng, objects, relation)


def _place_several(rng, sides, vertical):
    """Centres of two objects, the first before the second along one axis, and of a third one."""
    first, second, *third = sides
    low, high = _MARGIN, 1 - _MARGIN
    while True:
        # they touch at half the sum of their sides: some shapes overlap a little
        nearest = max(0.3, 0.44 * (first + second))
        distance = rng.uniform(nearest, min(0.62, high - low - (first + second) / 2))
        along = rng.uniform(low + first / 2, high - second / 2 - distance)
        across = rng.uniform(low + first / 2, high - first / 2)
        shifted = across + rng.uniform(-0.08, 0.08)
        shifted = min(max(shifted, low + second / 2), high - second / 2)
        centers = [(along, across), (along + distance, shifted)]
        if abs(across - shifted) > 0.12:
            continue
        for side in third:
            for _ in range(20):
                spot = tuple(rng.uniform(low + side / 2, high - side / 2) for _ in "xy")
                gaps = [math.dist(spot, c) - 0.6 * (side + s) for c, s in zip(centers, sides)]
                if min(gaps) > 0:
                    centers.append(spot)
                    break
        if len(centers) == len(sides):
            return [(y, x) for x, y in centers] if vertical else centers


def _outline(shape, angle):
    """Corners of a shape around (0, 0), turned by ``angle`` radians; its box's longer side is 1."""
    corners = {"circle": 72, "square": 4, "triangle": 3, "star": 10}[shape]
    start = angle - math.pi / (4 if shape == "square" else 2)
    turns = [start + 2 * math.pi * i / corners for i in range(corners)]
    radii = [0.45 if shape == "star" and i % 2 else 1 for i in range(corners)]
    points = [(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(radii, turns)]
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*points))
    side = max(right - left, bottom - top)
    return [((x - (left + right) / 2) / side, (y - (top + bottom) / 2) / side) for x, y in points]


def _describe_one(rng, scene, place):
    thing = scene["objects"][0]
    short = f"{thing['color']} {thing['shape']}"
    long = f"{thing['size']} {short}"
    where, on = _PLACES[place[0] + 3 * place[1]], f"on a {scene['background']} background"
    sentences = [
        f"a {long} {on}",
        f"a {long} {where}",
        f"there is a {long} {where}",
        f"one {long} {on}",
        f"a {short} {where} of the picture",
        f"the picture shows a {long} {where}",
        f"there is a {short} {on}",
    ]
    return rng.sample(sentences, 5)


def _describe_several(rng, objects, relation):
    captions = []
    for i, opening in enumerate(rng.sample(("", "", "", "there is ", "we see "), 5)):
        sized = rng.random() < 0.5
        first, second, *third = [
            f"a {thing['size'] + ' ' if sized else ''}{thing['color']} {thing['shape']}"
            for thing in objects
        ]
        pair = f"{second} {PHRASES[_INVERSE[relation]]} {first}"
        if i % 2:
            pair = f"{first} {PHRASES[relation]} {second}"
        parts = [pair, *third] if rng.random() < 0.7 else [*third, pair]
        captions.append(opening + " and ".join(parts))
    return captions


def _draw_scene(scene, outlines, key, size, _):
    """:return: uint8 (size, size, 3)"""
    rng = random.Random(f"{key}/picture")
    picture = Image.fromarray(_draw_background(rng, scene["background"], size))
    for thing, outline in zip(scene["objects"], outlines):
        left, top = (math.floor(value * size) - 8 for value in thing["box"][:2])
        right, bottom = (math.ceil(value * size) + 8 for value in thing["box"][2:])
        mask = Image.new("L", (4 * (right - left), 4 * (bottom - top)))
        corners = [(4 * (x * size - left), 4 * (y * size - top)) for x, y in outline]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        mask = mask.reduce(4)  # drawn four times as large: smooth edges
        shadow = mask.filter(ImageFilter.GaussianBlur(size / 100)).point(lambda v: v * 2 // 5)
        picture.paste((40, 40, 50), (left + size // 100, top + size // 80), shadow)
        light = rng.randint(-8, 8)
        shade = tuple(min(max(c + light, 0), 255) for c in SHAPE_COLORS[thing["color"]])
        picture.paste(shade, (left, top), mask)
    return np.array(picture)


def _draw_background(rng, kind, size):
    """:return: uint8 (size, size, 3)"""
    tint = np.array(list(bytes.fromhex(rng.choice(_TINTS))), np.float32)
    line = np.arange(size, dtype=np.float32) / size
    across, down = rng.choice(((1, 0), (0, 1), (0.6, 0.8), (0.8, -0.6)))
    ramp = across * line + down * line[:, None]
    light = np.ones_like(ramp)
    if kind == "shaded":
        light = 0.84 + 0.34 * (ramp - ramp.min()) / (ramp.max() - ramp.min())
    elif kind == "striped":  # a triangle wave: the same bytes on any machine, unlike a sine
        wave = np.abs(ramp * rng.randint(5, 9) % 1 - 0.5) * 4 - 1
        light = 1 + 0.09 * np.clip(wave * 5, -1, 1)
    elif kind == "speckled":
        grain = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
        light = 0.86 + grain * np.float32(0.28 / 255)
    return (tint * light[..., None]).astype(np.uint8)  # the tints are dark enough for that
