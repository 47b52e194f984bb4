"""Captioned pictures: where they come from, how their words become numbers, and the HDF5 files that hold them.

Sources are read into a list of :class:`Record`; :func:`write_dataset` writes them as three HDF5 files and a word map;
:class:`CaptionDataset` reads one of those files::

    records, notes = flickr8k_records("data")
    write_dataset("data", records, dataset="flickr8k", source="Flickr8k, official split")
    train = CaptionDataset(split_path("data", "train", base_name("flickr8k", 5, 5)))
    train.images([3, 1, 2])  # uint8 (3, 3, 256, 256)
"""

import collections
import concurrent.futures
import contextlib
import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import threading
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import h5py
import numpy as np
import regex
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from utils import (
    UserError,
    all_gather,
    atomic_path,
    available_cores,
    barrier,
    broadcast,
    is_main,
    locked,
    progress,
    read_json,
    share,
)

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
PAD_ID = 0
SPLITS = ("train", "val", "test")

# ---------------------------------------------------------------------------------------------------------- file names


def base_name(dataset, captions_per_image, min_word_freq):
    """Name that all files of one prepared data set share, e.g. ``flickr8k_5_cap_per_img_5_min_word_freq``."""
    return f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"


def check_name(name, what="the data's name", longest=120):
    """Files are called by this name, and none of them may lie elsewhere, whatever a flag or a checkpoint says.

    :raises UserError: if it holds anything else than letters, digits, dots, dashes and underscores
    """
    if (
        not isinstance(name, str)
        or not regex.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or len(name) > longest
    ):
        raise UserError(
            f"{what} {name!r}: expected a name of at most {longest} letters, digits, dots, dashes and "
            "underscores, since files are called by it"
        )


def split_path(folder, split, name):
    """Path of one split's HDF5 file."""
    return Path(folder) / f"{split.upper()}_{name}.hdf5"


def word_map_path(folder, name):
    """Path of the word map."""
    return Path(folder) / f"WORDMAP_{name}.json"


def contact_sheet_path(folder, name):
    """Path of the picture that shows a few captioned training pictures."""
    return Path(folder) / f"CONTACT_SHEET_{name}.png"


def pictures_folder(folder, name):
    """Folder of the few generated pictures that are also written as PNG files."""
    return Path(folder) / f"PICTURES_{name}"


def checkpoint_path(folder, name, best=False):
    """Path of the last checkpoint, or of the best one."""
    return Path(folder) / f"{'BEST_' if best else ''}checkpoint_{name}.pth.tar"


def log_path(folder, name):
    """Path of the training log, one JSON object a line."""
    return Path(folder) / f"log_{name}.jsonl"


def curves_path(folder, name):
    """Path of the learning curves."""
    return Path(folder) / f"curves_{name}.png"


def features_path(folder, name, split, key):
    """Path of the stored features of one split; ``key`` tells encoder, weights and data apart."""
    return Path(folder) / f"FEATURES_{split.upper()}_{name}_{key}.npy"


def lock_path(path):
    """Path of the lock file that a run holds while it writes a file or the files of a folder."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock")


def captions_path(folder, name, split, beam_size):
    """Path of the captions written by ``eval.py``."""
    return Path(folder) / f"captions_{split}_{name}_beam{beam_size}.json"


def attention_path(folder, picture, suffix):
    """Path of the picture, or animation, of where the model looked."""
    return Path(folder) / f"{picture}_attention.{suffix}"


def metrics_path(folder, name, split):
    """Path of the metrics written by ``eval.py``."""
    return Path(folder) / f"metrics_{split}_{name}.json"


# --------------------------------------------------------------------------------------------------------------- words

TOKENIZER = "NFC, lower case, runs of letters, marks and digits"
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_UNPRINTABLE = regex.compile(r"[\p{Cc}\p{Cs}\s]+")


def tokenize(text):
    """Split a caption into words.

    :param text: a caption in any alphabet
    :return: list of lower-case words: runs of letters, marks and digits; punctuation and underscores are dropped
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def clean_caption(text):
    """Put a caption on one line: control characters, broken Unicode and runs of white space become one space."""
    return _UNPRINTABLE.sub(" ", text).strip()


def build_word_map(token_lists, min_word_freq):
    """Number the words that occur often enough.

    :param token_lists: iterable of lists of words, of the training split alone
    :param min_word_freq: a word must occur at least so many times
    :return: dict word -> id: ``<pad>`` 0, then the words, most frequent first (ties in alphabetical order), then
        ``<unk>``, ``<start>``, ``<end>``
    """
    counts = collections.Counter(itertools.chain.from_iterable(token_lists))
    words = sorted(
        (word for word, count in counts.items() if count >= min_word_freq),
        key=lambda w: (-counts[w], w),
    )
    return {word: i for i, word in enumerate([PAD, *words, UNK, START, END])}


def load_word_map(path):
    """Read a word map and check it.

    :return: dict word -> id
    :raises UserError: if the file is missing or is no word map: ids 0 to n - 1, each once, with the four special tokens
    """
    word_map = read_json(path)
    if not isinstance(word_map, dict) or not all(type(i) is int for i in word_map.values()):
        raise UserError(f"{path} is no word map: expected a JSON object of words and their numbers")
    missing = [token for token in (PAD, UNK, START, END) if token not in word_map]
    if missing:
        raise UserError(
            f"{path} is no word map: it lacks {', '.join(missing)}; make it with create_input_files.py"
        )
    if sorted(word_map.values()) != list(range(len(word_map))) or word_map[PAD] != 0:
        raise UserError(
            f"{path} is no word map: expected the numbers from {PAD}'s 0 to {len(word_map) - 1}, each once"
        )
    return word_map


def special_tokens(word_map):
    """Numbers of the tokens that no caption may hold."""
    return [word_map[PAD], word_map[START], word_map[UNK]]


def word_map_digest(word_map):
    """Short SHA-256, in hex, of a word map's content, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()[:16]


def encode_caption(tokens, word_map, max_len):
    """Turn words into ids.

    :param tokens: list of at most ``max_len`` words
    :return: list of ``max_len + 2`` ids: ``<start>``, the words (``<unk>`` for those not in the map), ``<end>``, and
        ``<pad>`` to the full length
    :raises ValueError: if there are more than ``max_len`` words
    """
    if len(tokens) > max_len:
        raise ValueError(f"a caption of {len(tokens)} words, expected at most {max_len}")
    unknown = word_map[UNK]
    ids = [word_map[START], *(word_map.get(token, unknown) for token in tokens), word_map[END]]
    return ids + [word_map[PAD]] * (max_len + 2 - len(ids))


def decode_caption(ids, words):
    """Turn ids back into words.

    :param ids: iterable of ids
    :param words: list of words by id
    :return: list of words up to the first ``<end>``, without ``<start>`` and ``<pad>``
    """
    tokens = itertools.takewhile(lambda token: token != END, (words[i] for i in ids))
    return [token for token in tokens if token not in (START, PAD)]


# ------------------------------------------------------------------------------------------------------------ pictures

MAX_PIXELS = (
    89_478_485  # Pillow's own line, beyond which it warns of decompression bombs: 268 MB as RGB
)
MAX_PICTURE_BYTES = 2**28
PICTURE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)


def open_image(source, size=None, name=None):
    """Read a picture as a person would see it: colours of every mode as RGB, rotated as its EXIF says.

    Transparent pixels lie over white; 16-bit and floating-point values are scaled, not clipped; of an animation, the
    first frame is read.

    :param source: path, bytes or binary file
    :param size: if the picture will be made no larger than ``size`` pixels, a big JPEG can be decoded at a fraction of
        the cost: the result then has at least twice as many pixels along each side
    :param name: what error messages call the picture; default: its path
    :return: ``PIL.Image.Image`` of mode RGB
    :raises UserError: if it cannot be read: missing, empty, truncated, no picture, or of more than 89 million pixels
    """
    name = name or (
        source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the picture")
    )
    # Pillow's decoders raise nearly every type of exception on damaged data, so none can be singled out.
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError("too many pixels")
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            image.load()
            with contextlib.suppress(
                Exception
            ):  # a damaged EXIF block must not cost us a sound picture
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {name}: there is no such file") from error
    except Exception as error:
        if isinstance(error, (UserError, Image.DecompressionBombError)):
            reason = f"it has more than {MAX_PIXELS:,} pixels; shrink it"
        else:
            reason = (
                "not in a known format"
                if isinstance(error, UnidentifiedImageError)
                else (clean_caption(str(error)) or type(error).__name__)
            )
            reason += "; expected a whole JPEG, PNG, GIF, BMP, WebP or TIFF file: get it again, or save it anew"
        raise UserError(f"cannot read {name} as a picture: {reason}") from error


def _to_rgb(image):
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scale_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _scale_to_bytes(values, mode):
    """Values of a 16-bit, 32-bit or floating-point picture as uint8; the mode and the extremes tell the scale."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        low, high = 0, 65535
    elif low >= 0:
        scales = (1, 255) if mode == "F" else (255, 65535)
        low, high = 0, next((scale for scale in scales if high <= scale), high)
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def resize_image(image, size):
    """Squash a whole picture into a square, so that an attention map covers all of it.

    :param image: uint8 (height, width, 3), or a ``PIL.Image.Image`` of mode RGB
    :param size: side in pixels
    :return: uint8 (3, size, size), antialiased
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------------- sources


class Record(NamedTuple):
    """One captioned picture.

    ``image(size)`` gives it as :func:`resize_image` takes it or raises :class:`UserError`; ``size`` is the hint of
    :func:`open_image`. ``scene`` says what a generated picture shows, see :func:`shapes_records`.
    """

    name: str
    split: str
    captions: list
    image: Callable
    scene: dict | None = None


MAX_LOST = (
    0.03  # a data set that lacks more of its pictures than this is not the one that was asked for
)


def too_many_lost(lost, total):
    """Whether so many pictures are lost that the data set should not be used (one may always be)."""
    return lost > max(1, MAX_LOST * total)


FLICKR8K = {  # each archive, and what may stand for it: itself or what it unpacks to
    "Flickr8k_Dataset.zip": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset.zip"),
    "Flickr8k_text.zip": (
        "Flickr8k.token.txt",
        "Flickr8k_text/Flickr8k.token.txt",
        "Flickr8k_text.zip",
    ),
}


def flickr8k_records(folder):
    """Flickr8k with its official split.

    :param folder: holds ``Flickr8k_Dataset.zip`` and ``Flickr8k_text.zip`` (read in place), or what they unpack to
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if something is missing or damaged
    """
    folder = Path(folder)
    pictures = _Pictures(_first_existing(folder, *FLICKR8K["Flickr8k_Dataset.zip"]))
    captions = collections.defaultdict(list)
    text = _flickr8k_text(folder, "Flickr8k.token.txt")
    for name, caption, _ in _token_rows(text, "Flickr8k.token.txt"):
        captions[name].append(caption)

    records, missing = [], []
    for split, file in zip(SPLITS, ("trainImages", "devImages", "testImages")):
        names = [
            name
            for name in _flickr8k_text(folder, f"Flickr_8k.{file}.txt").split("\n")
            if name.strip()
        ]
        for name in map(str.strip, names):
            image = pictures.find(name)
            if image is None or name not in captions:
                missing.append(name)
            else:
                records.append(Record(name, split, captions[name], image))
    _check_unique(records, folder)
    notes = _check_missing(missing, len(records) + len(missing), folder)
    counts = [sum(record.split == split for record in records) for split in SPLITS]
    if counts != [6000, 1000, 1000] and not missing:
        notes.append(
            "not the whole of Flickr8k: {} + {} + {} pictures, officially 6000 + 1000 + 1000".format(
                *counts
            )
        )
    return records, notes


def missing_flickr8k_archives(folder):
    """:return: list of the archives' names that a folder lacks, and lacks unpacked too"""
    return [
        archive
        for archive, names in FLICKR8K.items()
        if not any((Path(folder) / name).exists() for name in names)
    ]


def _first_existing(folder, *names):
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} holds none of {', '.join(names)}; put one there")


def _flickr8k_text(folder, name):
    path = _first_existing(folder, name, f"Flickr8k_text/{name}", "Flickr8k_text.zip")
    if path.suffix != ".zip":
        return _read_text(path)
    archive = _open_zip(path)
    member = next((info for info in archive.infolist() if _archived_name(info) == name), None)
    if member is None:
        raise UserError(f"{path} lacks {name}; delete the archive and download it again")
    return _decode_text(_read_member(archive, member), f"{path}/{name}")


def karpathy_records(json_path, images):
    """Pictures and captions listed in one of Karpathy's files (``dataset_flickr8k.json``, ``…30k…``, ``…coco…``).

    :param json_path: the file; its split ``restval`` counts as train
    :param images: folder or zip archive of the pictures; COCO's lie in the subfolders that the file names
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if the file has another layout or the pictures are not there
    """
    content = read_json(json_path)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("images"), list)
        or not content["images"]
    ):
        raise UserError(
            f'{json_path} is not one of Karpathy\'s files: expected {{"images": [...], "dataset": ...}}'
        )
    pictures = _Pictures(images)
    records, missing, without = [], [], 0
    for number, entry in enumerate(content["images"]):
        try:
            name = entry["filename"]
            split = {"restval": "train"}.get(entry["split"], entry["split"])
            path = f"{entry['filepath']}/{name}" if entry.get("filepath") else name
            captions = [
                s["raw"] if "raw" in s else " ".join(s["tokens"]) for s in entry["sentences"]
            ]
            if split not in SPLITS or not all(
                isinstance(text, str) for text in (name, path, *captions)
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f'{json_path}: entry {number} of "images" is malformed: expected filename, split (train, '
                "restval, val or test) and sentences, each with raw or tokens"
            ) from error
        if not any(map(tokenize, captions)):
            without += 1
            continue
        image = pictures.find(path)
        if image is None:
            missing.append(path)
        else:
            records.append(Record(name, split, captions, image))
    _check_unique(records, json_path)
    notes = _check_missing(missing, len(records) + len(missing), images)
    if without:
        notes.append(f"{without:,} pictures have no sentences in {json_path}; they are left out")
    return records, notes


def custom_records(images, captions, seed):
    """The user's own pictures and captions.

    :param images: folder or zip archive of the pictures
    :param captions: UTF-8 text file: CSV with the header ``image,caption`` or ``image,caption,split``; or JSON lines,
        ``{"image": …, "caption": …}`` or ``{"image": …, "captions": […]}``, each with ``"split"`` if wanted; or
        Flickr's format, ``name.jpg#0<TAB>caption``. Names are relative to ``images``; a bare file name will do where
        it is unique. Rows of one picture are gathered.
    :param seed: pictures without a split are dealt out with it, 80 % train, 10 % val, 10 % test
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if a row is malformed (its line is named) or the pictures are not there
    """
    text = _read_text(captions)
    start = text.lstrip()[:1000]
    if not start:
        raise UserError(
            f"{captions} is empty; expected captions as CSV, JSON lines or Flickr's token format"
        )
    if start.startswith("["):
        raise UserError(
            f'{captions}, line 1: a JSON array; expected JSON lines, each as {{"image": "name.jpg", '
            '"caption": "..."}'
        )
    if start.startswith("{"):
        rows = _json_rows(text, captions)
    elif regex.match(r"[^\t\n]+#\d+\t", start):
        rows = _token_rows(text, captions)
    else:
        rows = _csv_rows(text, captions)

    gathered, splits, repeated = {}, {}, 0
    for name, caption, (split, line) in rows:
        if split and splits.setdefault(name, split) != split:
            raise UserError(
                f"{captions}, line {line}: {name} is in {split} here, but in {splits[name]} above"
            )
        own = gathered.setdefault(name, [])
        repeated += caption in own
        if caption not in own:
            own.append(caption)
    if not gathered:
        raise UserError(f"{captions} holds no caption; expected a row for each below the header")
    splits = {**_deal([name for name in gathered if name not in splits], seed), **splits}

    pictures = _Pictures(images)
    records, missing, used = [], [], set()
    for name, texts in gathered.items():
        image = pictures.find(name)
        if image is None:
            missing.append(name)
        else:
            records.append(Record(name, splits[name], texts, image))
            used.add(image)
    if len(used) < len(records):
        raise UserError(
            f"{captions} names one picture of {images} in two ways (with and without its folder); use one"
        )
    notes = _check_missing(missing, len(gathered), images)
    unused = pictures.count() - len(used)
    if unused > 0:
        notes.append(
            f"{unused:,} pictures of {images} have no caption in {captions}; they are left out"
        )
    if repeated:
        notes.append(
            f"{repeated:,} rows of {captions} repeat a caption of the same picture; they are left out"
        )
    return records, notes


def _deal(names, seed):
    """Split by the order of the names' hashes: whatever the order of the rows, and never an empty part if avoidable."""
    ranked = sorted(
        names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "replace")).digest()
    )
    tenth = max(1, round(len(ranked) / 10))
    return {
        name: "test" if i < tenth else "val" if i < 2 * tenth else "train"
        for i, name in enumerate(ranked)
    }


def _csv_rows(text, path):
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = None
    try:
        for fields in reader:
            if not any(fields):
                continue
            if columns is None:
                columns = [field.strip().lower() for field in fields]
                if not {"image", "caption"} <= set(columns):
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected the header image,caption or "
                        f"image,caption,split, found {','.join(fields)[:80]!r}"
                    )
                continue
            if len(fields) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, expected {len(columns)} "
                    f"({','.join(columns)}); put captions that hold a comma in double quotes"
                )
            row = dict(zip(columns, fields))
            where = f"{path}, line {reader.line_num}"
            yield (
                _name(row["image"], where),
                row["caption"],
                (_split(row.get("split"), where), reader.line_num),
            )
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def _json_rows(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}") from error
        captions = (
            [row["caption"]]
            if isinstance(row, dict) and "caption" in row
            else row.get("captions")
            if isinstance(row, dict)
            else None
        )
        if not isinstance(captions, list) or not all(
            isinstance(t, str) for t in (row.get("image"), *captions)
        ):
            raise UserError(
                f'{where}: expected {{"image": "name.jpg", "caption": "..."}}, found {line.strip()[:80]!r}'
            )
        for caption in captions:
            yield _name(row["image"], where), caption, (_split(row.get("split"), where), number)


def _token_rows(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        key, tab, caption = line.rstrip("\r").partition("\t")
        name, mark, index = key.rpartition("#")
        if not (tab and mark and name.strip() and index.strip().isdigit()):
            raise UserError(
                f"{path}, line {number}: expected name.jpg#0<TAB>caption, found {line[:80]!r}"
            )
        yield name.strip(), caption, (None, number)


def _name(name, where):
    if not name.strip():
        raise UserError(f"{where}: the picture's name is empty")
    return name.strip()


def _split(split, where):
    if split is None or (isinstance(split, str) and not split.strip()):
        return None
    if not isinstance(split, str) or split.strip().lower() not in SPLITS:
        raise UserError(
            f"{where}: unknown split {split!r}; expected one of {', '.join(SPLITS)}, or nothing"
        )
    return split.strip().lower()


def _check_unique(records, where):
    names = collections.Counter(record.name for record in records)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice:
        raise UserError(
            f"{where}: {twice} is listed twice; expected each picture once, in one split"
        )


def _check_missing(missing, total, where):
    """Note a few missing pictures; refuse many."""
    if total == len(missing) or too_many_lost(len(missing), total):
        examples = ", ".join(map(repr, missing[:3]))
        raise UserError(
            f"{len(missing):,} of {total:,} pictures are missing in {where} (or have no captions), "
            f"such as {examples}; is it the right folder, and whole?"
        )
    return [f"{name!r} is missing in {where} (or has no caption); left out" for name in missing]


class _Pictures:
    """Pictures of a folder or of a zip archive, found by relative path or by a file name that is unique there.

    Only what was seen while listing is ever opened, so no name from a caption file leads outside.
    """

    def __init__(self, path):
        path = Path(path)
        if path.is_dir():
            self._readers = {
                name: functools.partial(_read_file, full) for name, full in _list_folder(path)
            }
        elif path.is_file():
            archive, lock = _open_zip(path), threading.Lock()
            self._readers = {
                info.filename: functools.partial(_read_archived, archive, info, lock)
                for info in archive.infolist()
                if not info.is_dir() and _archived_name(info)
            }
        else:
            raise UserError(f"{path}: there is no such folder or zip archive of pictures")
        names = collections.defaultdict(list)
        for name in self._readers:
            names[PurePosixPath(name).name].append(name)
        self._unique = {name: paths[0] for name, paths in names.items() if len(paths) == 1}

    def find(self, name):
        """:return: the picture's ``Record.image``, the same object each time, or None"""
        name = name.replace("\\", "/").removeprefix("./") if name not in self._readers else name
        return self._readers.get(name) or self._readers.get(
            self._unique.get(PurePosixPath(name).name)
        )

    def count(self):
        """:return: number of files that are pictures by their names"""
        return sum(PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES for name in self._readers)


def _list_folder(root):
    """Yield (relative path with slashes, path) of all files; links to folders are followed, each folder once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = [
            n for n in sorted(subfolders) if os.path.realpath(os.path.join(folder, n)) not in seen
        ]
        for name in sorted(files):
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _read_file(path, size):
    if not path.is_file():  # a named pipe would be waited for, for ever
        raise UserError(f"cannot read {path} as a picture: it is no regular file")
    return open_image(path, size)


def _read_archived(archive, info, lock, size):
    return open_image(
        _read_member(archive, info, lock), size, name=f"{archive.filename}/{info.filename}"
    )


def _open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises several types on damaged archives
        raise UserError(
            f"{path} is not a whole zip archive ({str(error)[:160]}); delete it and download it again"
        ) from error


def _archived_name(info):
    """File name of an archive's member; empty for what macOS adds."""
    path = PurePosixPath(info.filename)
    return "" if "__MACOSX" in path.parts or path.name.startswith("._") else path.name


def _read_member(archive, info, lock=contextlib.nullcontext()):
    name = f"{archive.filename}/{info.filename}"
    if info.file_size > MAX_PICTURE_BYTES:
        raise UserError(
            f"{name} says it has {info.file_size:,} bytes; expected at most {MAX_PICTURE_BYTES:,}"
        )
    try:
        with lock:  # ZipFile counts its open members without one
            member = archive.open(info)
        try:
            return member.read()
        finally:
            with lock:
                member.close()
    except Exception as error:  # zipfile and its decompressors raise several types on damaged data
        reason = str(error)[:160] or type(error).__name__
        raise UserError(f"cannot read {name}: {reason}; download the archive again") from error


def _read_text(path):
    try:
        return _decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _decode_text(data, name):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}, line {line}: not UTF-8 text; save the file as UTF-8") from error


# -------------------------------------------------------------------------------------------------------------- shapes

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 34, 38),
    "green": (28, 152, 58),
    "blue": (32, 74, 214),
    "yellow": (250, 212, 22),
    "white": (250, 250, 250),
    "black": (18, 18, 20),
}
BACKGROUNDS = ("plain", "shaded", "striped", "speckled")
_TINTS = (
    (152, 160, 170),
    (176, 160, 144),
    (148, 166, 152),
    (170, 152, 168),
    (146, 160, 184),
    (166, 166, 160),
)
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_PLACES = {
    (0, 0): "at the top left",
    (1, 0): "at the top",
    (2, 0): "at the top right",
    (0, 1): "on the left",
    (1, 1): "in the middle",
    (2, 1): "on the right",
    (0, 2): "at the bottom left",
    (1, 2): "at the bottom",
    (2, 2): "at the bottom right",
}
_MARGIN = 0.03


def shapes_records(num_train=1600, num_val=200, num_test=300, seed=0, size=256):
    """Generated scenes of one to three coloured shapes, with captions that say what stands where.

    A picture depends on the seed, its split and its number alone. Its ``scene`` holds ``objects``, each with ``shape``,
    ``color``, ``size`` and ``box`` [x0, y0, x1, y1] in fractions of the picture; ``names``: for each word that names
    objects, their numbers; and ``background``.

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


def _make_scene(rng):
    """Draw by lot what a scene shows: the scene, the outlines of its objects in fractions of the picture, captions."""
    number = rng.choices((1, 2, 3), (30, 60, 10))[0]
    # every colour and every shape once, so that each of these words names one object
    looks = list(zip(rng.sample(list(COLORS), number), rng.sample(SHAPES, number)))
    sizes = [rng.choice(("small", "large")) for _ in looks]
    small, large = ((0.22, 0.27), (0.34, 0.42)) if number < 3 else ((0.18, 0.22), (0.26, 0.31))
    sides = [rng.uniform(*(small if size == "small" else large)) for size in sizes]
    relation = rng.choice(("left", "above"))  # of the first object to the second
    place = (rng.randrange(3), rng.randrange(3))
    centers = (
        _place_alone(rng, sides[0], place)
        if number == 1
        else _place_pair(rng, sides, relation == "above")
    )

    objects, outlines, names = [], [], collections.defaultdict(list)
    for i, ((color, shape), size, side, center) in enumerate(zip(looks, sizes, sides, centers)):
        outline = [
            (center[0] + side * x, center[1] + side * y)
            for x, y in _outline(shape, rng.uniform(-0.2, 0.2))
        ]
        xs, ys = zip(*outline)
        box = [round(value, 5) for value in (min(xs), min(ys), max(xs), max(ys))]
        objects.append({"shape": shape, "color": color, "size": size, "box": box})
        outlines.append(outline)
        names[shape].append(i)
        names[color].append(i)
    scene = {"objects": objects, "names": dict(names), "background": rng.choice(BACKGROUNDS)}
    captions = (
        _describe_one(rng, scene, place)
        if number == 1
        else _describe_several(rng, objects, relation)
    )
    return scene, outlines, captions


def _place_alone(rng, side, place):
    reach = 1 - 2 * _MARGIN - side
    return [
        tuple(
            _MARGIN + side / 2 + reach * (0.5 * p + rng.uniform(-0.06, 0.06) * (p == 1))
            for p in place
        )
    ]


def _place_pair(rng, sides, vertical):
    """Centres of two objects, the first before the second along one axis, and of a third one anywhere beside them."""
    first, second, *third = sides
    low, high = _MARGIN, 1 - _MARGIN
    while True:
        nearest = max(
            0.3, 0.44 * (first + second)
        )  # touching is at 0.5, so that some shapes overlap a little
        distance = rng.uniform(nearest, min(0.62, high - low - (first + second) / 2))
        along = rng.uniform(low + first / 2, high - second / 2 - distance)
        across = rng.uniform(low + first / 2, high - first / 2)
        across_second = min(
            max(across + rng.uniform(-0.08, 0.08), low + second / 2), high - second / 2
        )
        centers = [(along, across), (along + distance, across_second)]
        if abs(across - across_second) > 0.12:
            continue
        if third:
            side = third[0]
            spots = (
                (
                    rng.uniform(low + side / 2, high - side / 2),
                    rng.uniform(low + side / 2, high - side / 2),
                )
                for _ in range(20)
            )
            spot = next(
                (
                    s
                    for s in spots
                    if all(
                        math.dist(s, c) > 0.6 * (side + other) for c, other in zip(centers, sides)
                    )
                ),
                None,
            )
            if spot is None:
                continue
            centers.append(spot)
        return [(y, x) for x, y in centers] if vertical else centers


def _outline(shape, angle):
    """Corners of a shape around (0, 0), turned by ``angle`` radians, the longer side of its box being 1."""
    corners = {"circle": 72, "square": 4, "triangle": 3, "star": 10}[shape]
    start = -math.pi / 4 if shape == "square" else -math.pi / 2
    points = []
    for i in range(corners):
        radius = 0.45 if shape == "star" and i % 2 else 1
        turn = start + angle + 2 * math.pi * i / corners
        points.append((radius * math.cos(turn), radius * math.sin(turn)))
    xs, ys = zip(*points)
    side = max(max(xs) - min(xs), max(ys) - min(ys))
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [((x - middle[0]) / side, (y - middle[1]) / side) for x, y in points]


def _describe_one(rng, scene, place):
    thing = scene["objects"][0]
    short, long = (
        f"{thing['color']} {thing['shape']}",
        f"{thing['size']} {thing['color']} {thing['shape']}",
    )
    where, on = _PLACES[place], f"on a {scene['background']} background"
    return rng.sample(
        [
            f"a {long} {on}",
            f"a {long} {where}",
            f"there is a {long} {where}",
            f"one {long} {on}",
            f"a {short} {where} of the picture",
            f"the picture shows a {long} {where}",
            f"there is a {short} {on}",
        ],
        5,
    )


def _describe_several(rng, objects, relation):
    captions = []
    for i, opening in enumerate(rng.sample(("", "", "", "there is ", "we see "), 5)):
        sized = rng.random() < 0.5
        first, second, *third = [
            f"a {thing['size'] + ' ' if sized else ''}{thing['color']} {thing['shape']}"
            for thing in objects
        ]
        if i % 2:
            pair = f"{first} {PHRASES[relation]} {second}"
        else:
            pair = f"{second} {PHRASES[_INVERSE[relation]]} {first}"
        parts = [pair, *third] if rng.random() < 0.7 else [*third, pair]
        captions.append(opening + " and ".join(parts))
    return captions


def _draw_scene(scene, outlines, key, size, _):
    rng = random.Random(f"{key}/picture")
    picture = Image.fromarray(_draw_background(rng, scene["background"], size))
    for thing, outline in zip(scene["objects"], outlines):
        left, top = (math.floor(value * size) - 8 for value in thing["box"][:2])
        right, bottom = (math.ceil(value * size) + 8 for value in thing["box"][2:])
        mask = Image.new("L", (4 * (right - left), 4 * (bottom - top)))
        ImageDraw.Draw(mask).polygon(
            [(4 * (x * size - left), 4 * (y * size - top)) for x, y in outline], fill=255
        )
        mask = mask.reduce(4)
        shadow = mask.filter(ImageFilter.GaussianBlur(size / 100)).point(
            lambda value: value * 2 // 5
        )
        picture.paste((40, 40, 50), (left + size // 100, top + size // 80), shadow)
        light = rng.randint(-8, 8)
        shade = tuple(min(max(channel + light, 0), 255) for channel in COLORS[thing["color"]])
        picture.paste(shade, (left, top), mask)
    return np.array(picture)


def _draw_background(rng, kind, size):
    tint = np.array(rng.choice(_TINTS), np.float32)
    line = np.arange(size, dtype=np.float32) / size
    across, down = rng.choice(((1, 0), (0, 1), (0.6, 0.8), (0.8, -0.6)))
    ramp = across * line + down * line[:, None]
    if kind == "shaded":
        light = 0.84 + 0.34 * (ramp - ramp.min()) / (ramp.max() - ramp.min())
    elif kind == "striped":
        wave = (
            np.abs(ramp * rng.randint(5, 9) % 1 - 0.5) * 4 - 1
        )  # a triangle wave: the same bytes on any machine
        light = 1 + 0.09 * np.clip(wave * 5, -1, 1)
    elif kind == "speckled":
        grain = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
        light = 0.86 + grain * np.float32(0.28 / 255)
    else:
        light = np.ones_like(ramp)
    return (tint * light[..., None]).astype(np.uint8)  # no tint is so light that it would overflow


# ---------------------------------------------------------------------------------------------------------------- HDF5
# Every structure in these files carries HDF5's own checksum: the file format of version 1.10, and no variable-length
# type, since libhdf5 crashes or hangs on damaged ones. So texts are stored as JSON, and attributes of fixed length.

FORMAT = "show-attend-and-tell captions"
FORMAT_VERSION = 1


def write_dataset(
    folder,
    records,
    *,
    dataset,
    source,
    captions_per_image=5,
    min_word_freq=5,
    max_len=50,
    image_size=256,
    seed=0,
    workers=None,
):
    """Write the three splits and the word map; they appear together, once all are whole.

    :param folder: where the files go
    :param records: list of :class:`Record` of all splits
    :param dataset: name of the data set
    :param source: where it came from, in words
    :param captions_per_image: captions of each picture that are encoded for training; a longer list is drawn from by
        ``seed``, and a shorter one taken whole
    :param min_word_freq: words rarer than this in the training split become ``<unk>``
    :param max_len: captions of more words are not encoded
    :param image_size: side in pixels
    :param workers: threads that decode pictures; default: one for each core
    :return: dict of each split's summary (see :func:`write_split`), the word map
    :raises UserError: if a split has no pictures, no word is frequent enough, too many pictures cannot be read, or a
        file cannot be written
    """
    name = base_name(dataset, captions_per_image, min_word_freq)
    parts = {split: [record for record in records if record.split == split] for split in SPLITS}
    for split, part in parts.items():
        if not part:
            raise UserError(
                f"the {split} split of {dataset} has no pictures; each of {', '.join(SPLITS)} needs some"
            )
    token_lists = (tokenize(caption) for record in parts["train"] for caption in record.captions)
    word_map = build_word_map(token_lists, min_word_freq)
    if len(word_map) == 4:
        raise UserError(
            f"no word of the training captions occurs {min_word_freq} times; check that they hold words, "
            "or lower --min_word_freq"
        )

    summaries = {}
    with contextlib.ExitStack() as finished:
        finished.enter_context(locked(lock_path(word_map_path(folder, name)), Path(folder) / name))
        for split, part in parts.items():
            temporary = finished.enter_context(atomic_path(split_path(folder, split, name)))
            try:
                summaries[split] = write_split(
                    temporary,
                    part,
                    word_map,
                    split=split,
                    captions_per_image=captions_per_image,
                    max_len=max_len,
                    image_size=image_size,
                    seed=seed,
                    workers=workers,
                    attributes={
                        "dataset": dataset,
                        "name": name,
                        "min_word_freq": min_word_freq,
                        "source": source,
                    },
                )
            except OSError as error:  # h5py's text runs over many lines
                raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from error
        temporary = finished.enter_context(atomic_path(word_map_path(folder, name)))
        temporary.write_text(json.dumps(word_map, ensure_ascii=False) + "\n", encoding="utf-8")
    return summaries, word_map


def write_split(
    path,
    records,
    word_map,
    *,
    split,
    captions_per_image,
    max_len,
    image_size,
    seed,
    attributes,
    workers=None,
):
    """Write one HDF5 file, in place: give it a path from :func:`utils.atomic_path`.

    The same input gives the same bytes. Left out and counted: captions without a word; pictures without a caption (and
    for training, without one of at most ``max_len`` words); pictures that cannot be read. All captions with a word are
    kept as references.

    :param attributes: dict of what else the file should say of itself
    :return: dict: ``pictures``, ``captions`` (encoded), ``references``, ``words`` (encoded), ``unknown`` (of these,
        ``<unk>``), ``empty`` and ``too_long`` (captions), ``without_captions`` (pictures), ``unreadable`` (list of
        messages), ``bytes`` (of the file)
    :raises UserError: if more than 3 % of the pictures cannot be read (a single one may always be)
    """
    summary = collections.Counter(empty=0, too_long=0, without_captions=0)
    kept = []
    for record in records:
        references = [text for text in map(clean_caption, record.captions) if _WORD.search(text)]
        tokens = [tokenize(text) for text in references]
        usable = [words for words in tokens if len(words) <= max_len]
        summary["empty"] += len(record.captions) - len(references)
        summary["too_long"] += len(references) - len(usable)
        if not (usable if split == "train" else references):
            summary["without_captions"] += 1
            continue
        if len(usable) > captions_per_image:
            chosen = random.Random(f"{seed}/{_valid_text(record.name)}").sample(
                range(len(usable)), captions_per_image
            )
            usable = [usable[i] for i in sorted(chosen)]
        kept.append((record, references, usable))

    rows = sum(len(usable) for _, _, usable in kept)
    texts = _pack(
        [(references, _valid_text(record.name), record.scene) for record, references, _ in kept]
    )
    room = (
        len(kept) * (3 * image_size**2 + 100) + rows * (4 * (max_len + 2) + 8) + len(texts) + 2**20
    )
    _reserve(path, room)
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        _reserve(path, room)
        readable, unreadable, digest = _write_images(
            file, split, [record for record, _, _ in kept], image_size, workers
        )
        kept = [kept[i] for i in readable]
        if not kept:
            raise UserError(
                f"the {split} split has no picture with a caption; check the captions and --max_len"
            )

        encoded = [words for _, _, usable in kept for words in usable]
        captions = np.empty((len(encoded), max_len + 2), np.int32)
        for row, words in zip(captions, encoded):
            row[:] = encode_caption(words, word_map, max_len)
        file["captions"] = captions
        file["caption_lengths"] = np.array([len(words) + 2 for words in encoded], np.int64)
        file["caption_offsets"] = _offsets(len(usable) for _, _, usable in kept)
        file["references"] = _pack([references for _, references, _ in kept])
        file["image_names"] = _pack([_valid_text(record.name) for record, _, _ in kept])
        scenes = [record.scene for record, _, _ in kept]
        if None not in scenes:
            file["scenes"] = _pack(scenes)
        for key, value in {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "split": split,
            "image_size": image_size,
            "captions_per_image": captions_per_image,
            "max_len": max_len,
            "seed": seed,
            "tokenizer": TOKENIZER,
            "word_map_digest": word_map_digest(word_map),
            "images_digest": digest,
            **attributes,
        }.items():
            file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
    h5py.File(path, "r+", locking=False).close()  # gives back what was reserved and not needed
    return {
        **summary,
        "pictures": len(kept),
        "captions": len(encoded),
        "references": sum(len(references) for _, references, _ in kept),
        "words": sum(map(len, encoded)),
        "unknown": int((captions == word_map[UNK]).sum()),
        "unreadable": unreadable,
        "bytes": os.path.getsize(path),
    }


def _valid_text(name):
    """A name that UTF-8 can hold: Linux allows names that are no text."""
    return name.encode("utf-8", "replace").decode()


def _reserve(path, size):
    """Claim disk space for a file before libhdf5 writes it, since libhdf5 crashes where it finds none."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _offsets(lengths):
    return np.cumsum([0, *lengths], dtype=np.int64)


def _pack(value):
    """JSON as uint8; :func:`_unpack` is its inverse."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def _unpack(data):
    return json.loads(data[:].tobytes())


def _write_images(file, split, records, size, workers):
    """Decode pictures in threads and write them in order; return the readable ones' numbers, messages, a digest."""
    images = file.create_dataset(
        "images",
        (len(records), 3, size, size),
        np.uint8,
        chunks=(1, 3, size, size),
        maxshape=(None, 3, size, size),
    )
    workers = workers or available_cores()
    readable, unreadable, digest = [], [], hashlib.sha256()
    squares = read_ahead(functools.partial(_load_square, size=size), records, workers)
    for i, image in enumerate(
        progress(squares, total=len(records), desc=f"writing {split}", unit="picture")
    ):
        if isinstance(image, UserError):
            unreadable.append(str(image))
            if too_many_lost(len(unreadable), len(records)):
                raise UserError(
                    f"{len(unreadable)} of the first {i + 1:,} of {len(records):,} pictures cannot be read, "
                    f"too many to go on; the last: {image}"
                ) from image
            continue
        images.id.write_direct_chunk(
            (len(readable), 0, 0, 0), image
        )  # a chunk is a picture: nothing to select or filter
        digest.update(image)
        readable.append(i)
    images.resize(len(readable), axis=0)
    return readable, unreadable, digest.hexdigest()


def _load_square(record, size):
    """A picture as it is stored, or why it cannot be read."""
    try:
        return resize_image(record.image(size), size)
    except UserError as error:
        return error


def _is_list_of(value, kind):
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_scene(scene):
    """Whether a value has the layout of a scene (see :func:`shapes_records`)."""
    objects, names = scene["objects"], scene["names"]
    return (
        _is_list_of(objects, dict)
        and isinstance(names, dict)
        and all(
            isinstance(thing["color"], str) and isinstance(thing["shape"], str) for thing in objects
        )
        and all(
            _is_list_of(thing["box"], (int, float)) and len(thing["box"]) == 4 for thing in objects
        )
        and all(
            _is_list_of(numbers, int) and all(0 <= i < len(objects) for i in numbers)
            for numbers in names.values()
        )
    )


class CaptionDataset:
    """One split's file, read-only, for any number of processes: each opens it for itself when it first needs pictures.

    :ivar path, split, dataset, name: the file, and what it says of itself
    :ivar attributes: dict of everything it says of itself: settings, source, digests
    :ivar image_size: side of the pictures in pixels
    :ivar image_names: list of str
    :ivar captions: int32 (num_captions, max_len + 2), encoded, with ``<start>`` and ``<end>``, then ``<pad>``
    :ivar caption_lengths: int64 (num_captions,), with ``<start>`` and ``<end>``
    :ivar caption_offsets: int64 (num_images + 1,): picture i has the captions [offsets[i], offsets[i + 1])
    :ivar images_digest: SHA-256 of all pictures
    :ivar word_map_digest: see :func:`word_map_digest`
    """

    def __init__(self, path):
        """:raises UserError: if the file is missing, truncated or of another layout"""
        self.path = Path(path)
        self._file, self._process = None, None
        if not self.path.is_file():
            raise UserError(f"there is no {path}; create_input_files.py makes it")
        with self._reading(), h5py.File(self.path, "r", locking=False) as file:
            self.attributes = {
                key: value.decode() if isinstance(value, bytes) else value.item()
                for key, value in file.attrs.items()
            }
            if (self.attributes.get("format"), self.attributes.get("format_version")) != (
                FORMAT,
                FORMAT_VERSION,
            ):
                raise ValueError("it is of another format or version")
            limit = os.path.getsize(
                self.path
            )  # nothing is compressed: a larger claim is damage, not data
            if any(item.nbytes > limit for item in file.values()):
                raise ValueError("it claims more than it holds")
            self.split, self.dataset, self.name = (
                str(self.attributes[key]) for key in ("split", "dataset", "name")
            )
            self.image_size = int(self.attributes["image_size"])
            self.images_digest, self.word_map_digest = (
                str(self.attributes[key]) for key in ("images_digest", "word_map_digest")
            )
            self.captions = file["captions"][:]
            self.caption_lengths = file["caption_lengths"][:]
            self.caption_offsets = file["caption_offsets"][:]
            self.image_names = _unpack(file["image_names"])
            if not _is_list_of(self.image_names, str):
                raise ValueError("its pictures' names are damaged")
            self._check(file)

    def _check(self, file):
        pictures, width = len(self.image_names), int(self.attributes["max_len"]) + 2
        for name, dtype, shape in (
            ("images", np.uint8, (pictures, 3, self.image_size, self.image_size)),
            ("captions", np.int32, (len(self.caption_lengths), width)),
            ("caption_lengths", np.int64, (len(self.captions),)),
            ("caption_offsets", np.int64, (pictures + 1,)),
        ):
            if file[name].dtype != dtype or file[name].shape != shape:
                raise ValueError(
                    f"{name} is {file[name].dtype} {file[name].shape}, expected {np.dtype(dtype)} {shape}"
                )
        offsets = self.caption_offsets
        if offsets[0] != 0 or offsets[-1] != len(self.captions) or (np.diff(offsets) < 0).any():
            raise ValueError("its captions do not fit its pictures")
        if len(self.captions) and not (
            self.captions.min() >= 0
            and self.caption_lengths.min() >= 3
            and self.caption_lengths.max() <= width
        ):
            raise ValueError("its captions are damaged")

    @contextlib.contextmanager
    def _reading(self):
        """Turn what h5py raises on damaged files, which is nearly everything, into one clear line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.path} cannot be used ({clean_caption(str(error)) or type(error).__name__}); "
                "make it again with create_input_files.py --force"
            ) from error

    def __len__(self):
        return len(self.image_names)

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_process": None}

    def _open(self):
        if self._process != os.getpid():
            if self._file is not None:
                self._file.close()  # inherited by a fork: HDF5 would share the parent's handle with the new one
            self._file, self._process = h5py.File(self.path, "r", locking=False), os.getpid()
        return self._file

    def images(self, indices):
        """Read pictures.

        :param indices: slice, or sequence of numbers in any order, repeated or not
        :return: uint8 (len(indices), 3, image_size, image_size), in the order of ``indices``
        :raises UserError: if the file is damaged
        """
        indices = np.arange(len(self))[
            indices if isinstance(indices, slice) else np.asarray(indices, np.int64)
        ]
        batch = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        with self._reading():
            images = self._open()["images"]
            if len(indices) and (np.diff(indices) == 1).all():
                images.read_direct(batch, np.s_[indices[0] : indices[-1] + 1])
            else:
                for row, i in enumerate(indices):
                    images.read_direct(batch, np.s_[i], np.s_[row])
        return batch

    @functools.cached_property
    def raw_references(self):
        """All captions of each picture, as text: list of lists of str."""
        with self._reading():
            references = _unpack(self._open()["references"])
            if len(references) != len(self) or not all(
                _is_list_of(texts, str) for texts in references
            ):
                raise ValueError("its references do not fit its pictures")
        return references

    @functools.cached_property
    def references(self):
        """All captions of each picture, as lists of words (real words, never ``<unk>``)."""
        return [[tokenize(text) for text in texts] for texts in self.raw_references]

    @functools.cached_property
    def scenes(self):
        """What each generated picture shows (see :func:`shapes_records`); None for photographs."""
        with self._reading():
            file = self._open()
            scenes = _unpack(file["scenes"]) if "scenes" in file else None
            if scenes is not None and (len(scenes) != len(self) or not all(map(_is_scene, scenes))):
                raise ValueError("its scenes are damaged")
        return scenes

    def check_word_map(self, word_map):
        """:raises UserError: if the captions were encoded with another word map"""
        if word_map_digest(word_map) != self.word_map_digest:
            raise UserError(
                f"{self.path} was encoded with another word map; use the one that was written with it, "
                f"{word_map_path(self.path.parent, self.name)}"
            )
        with self._reading():
            if self.captions.size and self.captions.max() >= len(word_map):
                raise ValueError("its captions are damaged")


# ------------------------------------------------------------------------------------------- features and batches


def read_ahead(function, items, workers, ahead=0):
    """``map(function, items)`` in order, with some results prepared in threads while the caller works.

    :param ahead: how many, but at least two for each worker
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        pending = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > max(ahead, 2 * workers, 2):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # the caller stopped early
                future.cancel()


def feature_key(encoder_digest, images_digest, dtype):
    """Key of a feature store: it changes with the encoder, its weights, the pictures and the arithmetic."""
    return hashlib.sha256(f"{encoder_digest} {images_digest} {dtype}".encode()).hexdigest()[:12]


def encode_split(dataset, encode, path=None, rows=None, batch_size=32, workers=2):
    """Features of the pictures of a split, from the feature store ``path`` if it is there, else computed and kept.

    With several processes each computes its share of a store.

    :param dataset: ``CaptionDataset``
    :param encode: function of uint8 (B, 3, S, S) torch tensors to float (B, n, encoder_dim) tensors
    :param path: feature store, a .npy file whose name holds the key; None computes into memory
    :param rows: without a store: slice of the pictures to encode; None: all
    :param batch_size: pictures per call of ``encode``
    :param workers: threads that read pictures
    :return: float16 array (N, n, encoder_dim), memory-mapped if stored: the page cache keeps what fits in RAM, and all
        processes share it
    :raises UserError: if the store is damaged or cannot be written
    """
    if path is None:
        parts = _encoded(
            dataset, encode, np.arange(len(dataset))[rows or slice(None)], batch_size, workers
        )
        none = np.empty((0, 1, 1), np.float16)  # fewer pictures than processes
        return np.concatenate([out for _, out in parts] or [none])
    if not broadcast(
        path.exists()
    ):  # what is there can be read from a folder that may not be written
        with locked(
            lock_path(path), path, wait=True
        ):  # two runs on one data set: the second waits for the first's features
            if not broadcast(path.exists()):
                _write_features(path, dataset, encode, batch_size, workers)
    try:
        features = np.load(
            path, mmap_mode="c"
        )  # copy on write: torch wants arrays that it could write to
        if features.dtype != np.float16 or features.ndim != 3 or not features.flags.c_contiguous:
            raise ValueError("it is no float16 array of three dimensions")
        if features.offset + features.nbytes != os.path.getsize(path):
            raise ValueError("it has another size than it says")
    except Exception as error:  # numpy's header is Python text, and raises nearly every type
        reason = clean_caption(str(error))[:160] or type(error).__name__
        raise UserError(
            f"the feature store {path} is damaged ({reason}); delete it and run again"
        ) from error
    if len(features) != len(dataset):
        raise UserError(
            f"the feature store {path} has {len(features)} pictures, expected {len(dataset)}; "
            "delete it and run again"
        )
    return features


def _encoded(dataset, encode, pictures, batch_size, workers):
    """Yield (pictures, float16 features) batch by batch."""
    import torch

    batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    with progress(total=len(pictures), desc=f"encoding {dataset.split}", unit="picture") as bar:
        for batch, images in zip(batches, read_ahead(dataset.images, batches, workers)):
            yield batch, encode(torch.from_numpy(images)).to(torch.float16).cpu().numpy()
            bar.update(len(batch))


def _write_features(path, dataset, encode, batch_size, workers):
    """Write a feature store; each process of the run fills in its share."""
    parts = _encoded(
        dataset, encode, np.arange(len(dataset))[share(len(dataset))], batch_size, workers
    )
    first = next(parts, None)
    shape = (len(dataset), *next(s for s in all_gather(first and first[1].shape[1:]) if s))
    free, size = shutil.disk_usage(path.parent).free, 2 * math.prod(shape)
    if free < size:
        raise UserError(
            f"the feature store {path} needs {size / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; "
            "make room or choose another --data_folder"
        )
    with atomic_path(path) if is_main() else contextlib.nullcontext() as temporary:
        if is_main():
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            _reserve(
                temporary, temporary.stat().st_size
            )  # a mapped file that finds no space kills the process
        features = np.lib.format.open_memmap(broadcast(temporary), "r+")
        parts = itertools.chain([first] if first else [], parts)
        for _ in read_ahead(
            lambda part: features.__setitem__(*part), parts, workers=1
        ):  # the CNN need not wait for disks
            pass
        features.flush()
        barrier()  # all have written
    barrier()  # and the file has its name


def caption_pictures(dataset):
    """The picture of each caption, int64 (number of captions,)."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.caption_offsets))


def training_batches(dataset, batch_size, seed, epoch):
    """Pictures of each update of an epoch, as a list of index arrays: every picture once, in an order of its own.

    An update takes as many steps as its longest caption has words, so pictures meet others whose longest caption is of
    similar length, among those of 16 random batches. The order depends on the captions, seed and epoch alone, so that a
    resumed run sees what an uninterrupted one would have seen.

    :param dataset: ``CaptionDataset``
    """
    rng = np.random.default_rng([seed, epoch])
    longest = np.zeros(len(dataset), np.int64)
    np.maximum.at(longest, caption_pictures(dataset), dataset.caption_lengths)
    order, batches = rng.permutation(len(dataset)), []
    for i in range(0, len(order), 16 * batch_size):
        group = order[i : i + 16 * batch_size]
        group = group[np.argsort(longest[group], kind="stable")]
        batches += [group[j : j + batch_size] for j in range(0, len(group), batch_size)]
    rng.shuffle(batches)
    return batches


class WithMirrored:
    """The pictures of a split, and after them the same pictures mirrored: number N + i is picture i, left and right changed.

    It has what :func:`encode_split` asks of a ``CaptionDataset``.

    :param dataset: ``CaptionDataset``
    """

    def __init__(self, dataset):
        self.dataset, self.split = dataset, dataset.split
        self.images_digest = f"{dataset.images_digest} and mirrored"

    def __len__(self):
        return 2 * len(self.dataset)

    def images(self, numbers):
        """Pictures by number, uint8 (B, 3, S, S)."""
        images = self.dataset.images(numbers % len(self.dataset))
        mirrored = numbers >= len(self.dataset)
        images[mirrored] = images[mirrored, ..., ::-1]
        return images


def mirrored_pictures(dataset, word_map, seed, epoch):
    """Which pictures an epoch shows mirrored: half of those of which no caption says left or right, and which are thus
    still described truly when the two change places. Like the batches they depend on seed and epoch alone.

    :return: bool array (N,)
    """
    sides = [word_map[word] for word in ("left", "right") if word in word_map]
    mirrored = np.random.default_rng([seed, epoch, 1]).random(len(dataset)) < 0.5
    mirrored[caption_pictures(dataset)[np.isin(dataset.captions, sides).any(axis=1)]] = False
    return mirrored


class CaptionRows(NamedTuple):
    """The captions of a batch of pictures, longest first."""

    captions: np.ndarray  # int64 (B, max_caption_length)
    decode_lengths: list  # of B ints: words to predict, <end> included
    pictures: np.ndarray  # int64 (B,): position of the caption's picture in the batch


def count_words(dataset, pictures):
    """Words to predict in all captions of the given pictures, <end> included."""
    offsets = dataset.caption_offsets
    return int(
        sum((dataset.caption_lengths[offsets[i] : offsets[i + 1]] - 1).sum() for i in pictures)
    )


def caption_rows(dataset, pictures):
    """All captions of the given pictures.

    :param dataset: ``CaptionDataset``
    :param pictures: int array of picture indices, which may be empty
    :return: ``CaptionRows``
    """
    offsets = dataset.caption_offsets
    rows = np.concatenate(
        [np.arange(0), *(np.arange(offsets[i], offsets[i + 1]) for i in pictures)]
    )
    position = np.repeat(np.arange(len(pictures)), offsets[pictures + 1] - offsets[pictures])
    lengths = dataset.caption_lengths[rows]
    order = np.argsort(-lengths, kind="stable")
    captions = dataset.captions[rows[order], : lengths.max(initial=1)].astype(np.int64)
    return CaptionRows(captions, (lengths[order] - 1).tolist(), position[order])


def load_embeddings(path, word_map, embed_dim):
    """Word vectors in GloVe's text format for the words of a word map.

    :param path: lines of a word and ``embed_dim`` numbers, separated by spaces
    :return: (vectors, found): float32 (vocab_size, embed_dim), zero where the file lacks the word; bool (vocab_size,)
    :raises UserError: if the file is missing or a line has another number of values (the line is named)
    """
    vectors, found = np.zeros((len(word_map), embed_dim), np.float32), np.zeros(len(word_map), bool)
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                word, *values = line.rstrip().split(" ")
                if number == 1 and len(values) == 1:
                    continue  # word2vec's text format begins with two counts
                if number > 1 and len(values) > embed_dim:
                    continue  # a few of GloVe's words have spaces in them; no caption's have
                if len(values) != embed_dim:
                    raise UserError(
                        f"{path}, line {number}: {len(values)} values, expected {embed_dim}; "
                        "is the file whole, and --embed_dim the length of its vectors?"
                    )
                if word in word_map:
                    vectors[word_map[word]], found[word_map[word]] = (
                        np.array(values, np.float32),
                        True,
                    )
                    if not np.isfinite(vectors[word_map[word]]).all():
                        raise ValueError("not finite")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the embeddings {path}: {error}") from error
    except ValueError as error:
        raise (
            error
            if isinstance(error, UserError)
            else UserError(f"{path}, line {number}: not a number: {error}")
        )
    return vectors, found
