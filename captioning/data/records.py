"""A captioned picture of a source, before it is written; and the pictures that are lost."""

from typing import NamedTuple

from captioning.run.files import atomic_path
from captioning.run.messages import UserError, printable

SPLITS = ("train", "val", "test")
MOST_NOTES = 20  # on single pictures of a kind


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


class Lost:
    """The pictures that a data set goes without: missing ones, and ones that cannot be read.

    :ivar reasons: dict of their names to why
    """

    def __init__(self, path=None, allowed=False):
        """
        :param path: of a text file that names them all if they are many
        :param allowed: whether to go on without them, however many they are
        """
        self.path, self.allowed, self.reasons, self._too_many = path, allowed, {}, []

    def add(self, reasons, total, what, hint=""):
        """Count those of a part of the pictures.

        :param reasons: dict of names to why
        :param total: number of pictures of this part
        :param what, hint: what is said of the pictures, and to the user
        :raises UserError: if all are lost
        """
        self.reasons |= reasons
        if too_many_lost(len(reasons), total) or 0 < total == len(reasons):
            examples = ", ".join(map(repr, list(reasons)[:3]))
            message = f"{len(reasons):,} of {total:,} pictures {what}, such as {examples}{hint}"
            self._too_many.append(message)
            if total == len(reasons):
                raise UserError(message)

    def check(self):
        """:raises UserError: if they are too many to go on without a word of the user"""
        if self._too_many and not self.allowed:
            advice = f"{self._write()}; --skip_bad_pictures goes on without them"
            raise UserError("; ".join([*self._too_many, *[advice] * bool(self.path)]))

    def finish(self):
        """When the rest is written, name many of them in the file; list of a note on it or none."""
        if self.path and len(self.reasons) <= MOST_NOTES:
            self.path.unlink(missing_ok=True)  # that of an earlier run
        return [self._write()] if self.path and len(self.reasons) > MOST_NOTES else []

    def _write(self):
        if self.path:
            with atomic_path(self.path) as temporary:
                lines = (f"{printable(n)}\t{printable(why)}\n" for n, why in self.reasons.items())
                temporary.write_text("".join(lines), encoding="utf-8")
        return f"{self.path} names all {len(self.reasons):,} that are lost"
