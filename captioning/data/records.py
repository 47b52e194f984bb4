"""A captioned picture of a source, before it is written."""

from typing import NamedTuple

SPLITS = ("train", "val", "test")


class Record(NamedTuple):
    """One captioned picture of a source; while the source is read, what a line says of it."""

    name: str  # or path
    split: str | None  # None: not yet dealt to one
    captions: list
    image: object = None  # function of open_image's size: uint8 (height, width, 3) or an RGB Image
    scene: dict | None = None  # what a generated picture shows, see shapes_records
    image_id: int | None = None  # the source's own number of the picture, such as COCO's


class Settings(NamedTuple):
    """How records become HDF5 files."""

    image_size: int = 256  # side of the stored pictures in pixels
    captions_per_image: int = 5  # encoded for training; from more, so many are drawn by seed
    max_len: int = 50  # captions of more words are not encoded
    seed: int = 0


# one picture may always be lost; a data set that lacks more than 3 % is damaged or another one
too_many_lost = lambda lost, total: lost > max(1, 0.03 * total)
is_list_of = lambda x, kind: isinstance(x, list) and all(isinstance(item, kind) for item in x)
