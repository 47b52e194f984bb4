"""Captioned pictures: words become numbers, pictures become squares, and HDF5 files hold both.

A source is read into a list of :class:`Record`; :func:`write_dataset` writes them as three HDF5
files and a word map; :class:`CaptionDataset` reads one of these, :func:`collate` makes batches::

    records, notes = flickr8k_records("data")
    write_dataset("data", records, dataset="flickr8k", source="Flickr8k, official split")
    train = CaptionDataset(split_path("data", "train", base_name("flickr8k", 5, 5)))
"""

import collections
import concurrent.futures
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import regex
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

import utils
from utils import UserError

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
PAD_ID = 0
SPLITS = ("train", "val", "test")

# ------------------------------------------------------------------------------------------- words

# Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words: each letter is a word
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&\p{L}]"
_WORD = regex.compile(rf"{_SPACELESS}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{_SPACELESS}]+", regex.V1)


def tokenize(text):
    """Split a caption, in any alphabet, into words.

    :return: list of lower-case words: runs of letters, marks and digits (Unicode NFC), or single
        letters in scripts without spaces; punctuation and underscores are dropped
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def build_word_map(token_lists, min_word_freq):
    """Number the words that occur at least ``min_word_freq`` times.

    :param token_lists: iterable of lists of words, of the training split alone
    :return: dict word -> id: ``<pad>`` 0, then the words, most frequent first (ties in
        alphabetical order), then ``<unk>``, ``<start>``, ``<end>``
    """
    counts = collections.Counter(itertools.chain.from_iterable(token_lists))
    words = [word for word, count in counts.items() if count >= min_word_freq]
    words.sort(key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate([PAD, *words, UNK, START, END])}


def encode_caption(tokens, word_map, max_len):
    """Turn words into ids.

    :param tokens: list of at most ``max_len`` words
    :return: list of ``max_len + 2`` ids: ``<start>``, the words (``<unk>`` for those not in the
        map), ``<end>``, and ``<pad>`` to the full length
    """
    words = [word_map.get(token, word_map[UNK]) for token in tokens]
    padding = [word_map[PAD]] * (max_len - len(tokens))
    return [word_map[START], *words, word_map[END], *padding]


def decode_caption(ids, words):
    """Turn ids back into words.

    :param words: list of words by id
    :return: list of words up to the first ``<end>``, without ``<start>`` and ``<pad>``
    """
    tokens = itertools.takewhile(lambda token: token != END, (words[i] for i in ids))
    return [token for token in tokens if token not in (START, PAD)]


# ---------------------------------------------------------------------------------------- pictures

MAX_PIXELS = 89_478_485  # of a decoded picture: 268 MB as RGB; Pillow warns beyond it


def open_image(path, size=None):
    """Read a picture as a person would see it: of every mode as RGB, rotated as its EXIF says.

    Transparent pixels lie over white, 16-bit and float values are scaled, films give one picture.

    :param path: of a file; a ``zipfile.Path`` too
    :param size: side in pixels that the picture will be resized to, if known: a large JPEG is then
        decoded at 1/2, 1/4 or 1/8 of its size, with at least ``2 * size`` pixels along each side
    :return: ``PIL.Image.Image`` of mode RGB
    :raises UserError: if it is missing, empty, truncated, no picture, or of too many pixels
    """
    try:
        data = _read_bytes(path)
        # Image.open refuses 179 million pixels before it is known how many of a JPEG are decoded
        opened = JpegImageFile if data.startswith(b"\xff\xd8\xff") else Image.open
        with opened(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            if image.width * image.height > MAX_PIXELS or pixels > 4 * MAX_PIXELS:
                raise UserError(f"it has {pixels:,} pixels, too many")
            image.load()
            with contextlib.suppress(Exception):  # the picture is sound even if its EXIF is not
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged data
        raise UserError(
            f"cannot read {path} as a picture: {_why(error)}; expected a whole JPEG, PNG, GIF, WebP"
            f" or TIFF file of at most {MAX_PIXELS:,} pixels"
        ) from error


def resize_image(image, size):
    """Squash a whole picture into a square, so that an attention map covers all of it.

    :param image: uint8 (height, width, 3), or a ``PIL.Image.Image`` of mode RGB
    :param size: side in pixels
    :return: uint8 (3, size, size), antialiased
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))  # (size, size, 3)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))  # (3, size, size)


# ------------------------------------------------------------------------------------------- files


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


def write_dataset(folder, records, *, dataset, source, min_word_freq=5, workers=None, **settings):
    """Write the three splits and the word map; they appear together, once all are whole.

    :param records: list of :class:`Record` of all splits
    :param dataset, source: name of the data set, and where it came from, in words
    :param min_word_freq: words rarer than this in the training split become ``<unk>``
    :param workers: threads that decode pictures; default: one for each core
    :param settings: see :class:`Settings`
    :return: dict of each split's summary (see :func:`write_split`), the word map
    :raises UserError: if a split has no pictures, no word is frequent enough, too many pictures
        cannot be read, or a file cannot be written
    """
    settings = Settings(**settings)
    name = base_name(dataset, settings.captions_per_image, min_word_freq)
    parts = {split: [record for record in records if record.split == split] for split in SPLITS}
    if lacking := [split for split in SPLITS if not parts[split]]:
        raise UserError(f"{dataset} has no pictures in its {lacking[0]} split; each needs some")
    texts = (text for record in parts["train"] for text in record.captions)
    word_map = build_word_map(map(tokenize, texts), min_word_freq)
    if len(word_map) == len((PAD, UNK, START, END)):
        what = f"no word of the training captions occurs {min_word_freq} times"
        raise UserError(f"{what}; check that they hold words, or lower --min_word_freq")
    about = {"dataset": dataset, "name": name, "min_word_freq": min_word_freq, "source": source}
    map_path, summaries = word_map_path(folder, name), {}
    with contextlib.ExitStack() as finished:  # at its end the files get their names
        finished.enter_context(utils.locked(lock_path(map_path), Path(folder) / name))
        for split, part in parts.items():
            path = finished.enter_context(utils.atomic_path(split_path(folder, split, name)))
            summaries[split] = write_split(path, part, word_map, settings, about, workers)
        path = finished.enter_context(utils.atomic_path(map_path))
        path.write_text(json.dumps(word_map, ensure_ascii=False) + "\n", encoding="utf-8")
    return summaries, word_map


def write_split(path, records, word_map, settings, about, workers=None):
    """Write one HDF5 file, in place: give it a path from :func:`utils.atomic_path`.

    The same input gives the same bytes. Left out and counted: captions without a word; pictures
    without a caption (for training, without one of at most ``max_len`` words); pictures that cannot
    be read. All captions with a word are kept as references.

    :param records: list of :class:`Record` of one split
    :param about: dict of what else the file should say of itself
    :return: dict of counts: ``pictures``, ``captions`` (encoded), ``references``, ``words``
        (encoded), ``unknown`` (of these, ``<unk>``), ``empty`` and ``too_long`` (captions),
        ``without_captions`` (pictures), ``bytes``; and ``unreadable``, a list of messages
    :raises UserError: if more than 3 % of the pictures cannot be read (a single one may always be)
    """
    kept, summary = _choose_captions(records, settings)
    with _new_file(path, kept, settings) as file:
        readable, unreadable, digest = _write_images(file, kept, settings.image_size, workers)
        kept = [kept[i] for i in readable]
        encoded = [words for _, _, usable in kept for words in usable]
        captions = np.empty((len(encoded), settings.max_len + 2), np.int32)
        for i, words in enumerate(encoded):
            captions[i] = encode_caption(words, word_map, settings.max_len)  # (max_len + 2,)
        file["captions"] = captions  # (num_captions, max_len + 2)
        file["caption_lengths"] = np.array([len(words) + 2 for words in encoded], np.int64)
        file["caption_offsets"] = np.cumsum([0, *(len(u) for _, _, u in kept)], dtype=np.int64)
        file["references"] = _pack([references for _, references, _ in kept])
        file["image_names"] = _pack([_valid_text(record.name) for record, _, _ in kept])
        for key in ("scene", "image_id"):
            values = [getattr(record, key) for record, _, _ in kept]
            if any(value is not None for value in values):
                file[f"{key}s"] = _pack(values)
        about = {
            "format": FORMAT[0],
            "format_version": FORMAT[1],
            "split": records[0].split,
            **settings._asdict(),
            "tokenizer": "NFC, lower case, runs of letters, marks and digits",
            "word_map_digest": word_map_digest(word_map),
            "images_digest": digest,
            **about,
        }
        for key, value in about.items():
            file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
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


class CaptionDataset:
    """One split's HDF5 file, read-only; it is open only while something is read.

    :ivar path, split, dataset, name: the file, and what it says of itself
    :ivar attributes: dict of everything it says of itself: settings, source, digests
    :ivar image_size: side of the pictures in pixels
    :ivar image_names: list of str
    :ivar captions: int32 (num_captions, max_len + 2), encoded, with ``<start>`` and ``<end>``
    :ivar caption_lengths: int64 (num_captions,), with ``<start>`` and ``<end>``
    :ivar caption_offsets: int64 (num_images + 1,): picture i has captions offsets[i] to
        offsets[i + 1] - 1
    :ivar images_digest, word_map_digest: SHA-256 of all pictures; see :func:`word_map_digest`
    """

    def __init__(self, path):
        """:raises UserError: if the file is missing, truncated or of another layout"""
        self.path = Path(path)
        with _opened(self.path) as file:
            self.attributes = _attributes(file)
            for key in ("split", "dataset", "name", "images_digest", "word_map_digest"):
                setattr(self, key, str(self.attributes[key]))
            self.image_size = int(self.attributes["image_size"])
            self.captions = file["captions"][:]  # (num_captions, max_len + 2)
            self.caption_lengths = file["caption_lengths"][:]  # (num_captions,)
            self.caption_offsets = file["caption_offsets"][:]  # (num_images + 1,)
            self.image_names = _unpack(file["image_names"])
            _check_layout(self, file["images"])

    def __len__(self):
        return len(self.image_names)

    def images(self, indices):
        """Read pictures.

        :param indices: slice, or sequence of numbers in any order, repeated or not
        :return: uint8 (len(indices), 3, image_size, image_size), in the order of ``indices``
        :raises UserError: if the file is damaged
        """
        wanted = indices if isinstance(indices, slice) else np.asarray(indices, np.int64)
        indices = np.arange(len(self))[wanted]  # (B,)
        batch = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        with _opened(self.path) as file:
            images = file["images"]  # (num_images, 3, image_size, image_size)
            for row, i in enumerate(indices):
                batch[row] = images[i]  # (3, image_size, image_size)
        return batch

    @functools.cached_property
    def raw_references(self):
        """All captions of each picture, as text: list of lists of str."""
        return _stored_list(self, "references", lambda texts: _is_list_of(texts, str))

    @functools.cached_property
    def references(self):
        """All captions of each picture, as lists of words (real words, never ``<unk>``)."""
        return [[tokenize(text) for text in texts] for texts in self.raw_references]

    @functools.cached_property
    def scenes(self):
        """What each generated picture shows (see :func:`shapes_records`); None for photographs."""
        return _stored_list(self, "scenes", _is_scene)

    @functools.cached_property
    def image_ids(self):
        """The source's own number of each picture, such as COCO's: list of int or None."""
        ids = _stored_list(self, "image_ids", lambda i: i is None or type(i) is int)
        return ids or [None] * len(self)

    def check_word_map(self, word_map):
        """:raises UserError: if the captions were encoded with another word map"""
        is_its_own = word_map_digest(word_map) == self.word_map_digest
        if not is_its_own or self.captions.max(initial=0) >= len(word_map):
            right = word_map_path(self.path.parent, self.name)
            advice = f"use its own, {right}, or make both with create_input_files.py --force"
            raise UserError(f"{self.path} was encoded with another word map; {advice}")


# ----------------------------------------------------------------------------------------- batches


class CaptionBatch(NamedTuple):
    """The captions of a batch of pictures, longest first."""

    captions: np.ndarray  # int64 (B, max_caption_length)
    decode_lengths: list  # of B ints: words to predict, <end> included
    image_index: np.ndarray  # int64 (B,): position of the caption's picture in the batch


def training_batches(dataset, batch_size, seed, epoch):
    """Pictures of each update of an epoch: every picture once, in an order of its own.

    An update takes as many steps as its longest caption has words, so pictures meet others whose
    longest caption is of similar length, among those of 16 random batches. The order depends on the
    captions, seed and epoch alone.

    :return: list of int64 (at most ``batch_size``,) arrays of picture numbers
    """
    rng = np.random.default_rng([seed, epoch])
    longest = np.zeros(len(dataset), np.int64)  # (num_images,)
    np.maximum.at(longest, image_index(dataset), dataset.caption_lengths)
    order, batches = rng.permutation(len(dataset)), []
    for i in range(0, len(order), 16 * batch_size):
        group = order[i : i + 16 * batch_size]
        group = group[np.argsort(longest[group], kind="stable")]
        batches += [group[j : j + batch_size] for j in range(0, len(group), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(dataset, indices):
    """All captions of the given pictures (an int array, which may be empty): ``CaptionBatch``."""
    starts, stops = dataset.caption_offsets[indices], dataset.caption_offsets[indices + 1]
    rows = np.concatenate([np.arange(0), *map(np.arange, starts, stops)])  # (B,)
    position = np.repeat(np.arange(len(indices)), stops - starts)  # (B,)
    lengths = dataset.caption_lengths[rows]  # (B,)
    order = np.argsort(-lengths, kind="stable")
    captions = dataset.captions[rows[order], : lengths.max(initial=1)].astype(np.int64)
    return CaptionBatch(captions, (lengths[order] - 1).tolist(), position[order])


# ---------------------------------------------------------------- beyond the main path

# Each gives the path of a file in a folder; `name` is what all files of a data set share.
split_path = lambda folder, split, name: Path(folder) / f"{split.upper()}_{name}.hdf5"
word_map_path = lambda folder, name: Path(folder) / f"WORDMAP_{name}.json"
contact_sheet_path = lambda folder, name: Path(folder) / f"CONTACT_SHEET_{name}.png"
pictures_folder = lambda folder, name: Path(folder) / f"PICTURES_{name}"  # generated ones, as PNG
features_path = lambda at, name, split, key: Path(at) / f"FEATURES_{split.upper()}_{name}_{key}.npy"
checkpoint_path = lambda at, name, best=False: (
    Path(at) / f"{'BEST_' * best}checkpoint_{name}.pth.tar"
)
log_path = lambda folder, name: Path(folder) / f"log_{name}.jsonl"
curves_path = lambda folder, name: Path(folder) / f"curves_{name}.png"
captions_path = lambda at, name, split, beam: Path(at) / f"captions_{split}_{name}_beam{beam}.json"
metrics_path = lambda folder, name, split: Path(folder) / f"metrics_{split}_{name}.json"
attention_path = lambda folder, image, suffix: Path(folder) / f"{image}_attention.{suffix}"
lock_path = lambda path: Path(path).with_name(f".{Path(path).name}.lock")


def base_name(dataset, captions_per_image, min_word_freq):
    """Name that all files of one data set share: ``flickr8k_5_cap_per_img_5_min_word_freq``."""
    return f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"


def check_name(name, what="the data's name", longest=120):
    """:raises UserError: if a name cannot be part of a file's name or leads to another folder"""
    pattern = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{longest - 1}}}"
    if not isinstance(name, str) or not regex.fullmatch(pattern, name):
        known = f"at most {longest} letters, digits, dots, dashes and underscores"
        raise UserError(f"{what} {name!r}: expected {known}, since files are called by it")


def clean_caption(text):
    """Put a caption on one line: control characters, broken Unicode, white space become spaces."""
    return regex.sub(r"[\p{Cc}\p{Cs}\s]+", " ", text).strip()


def load_word_map(path):
    """Read a word map, dict word -> id; raises UserError if the file is none."""
    word_map = utils.read_json(path)
    ids = list(word_map.values()) if isinstance(word_map, dict) else [None]
    has_ids = all(type(i) is int for i in ids) and sorted(ids) == list(range(len(ids)))
    if not has_ids or not {UNK, START, END} <= set(word_map) or word_map.get(PAD) != PAD_ID:
        raise UserError(
            f"{path} is no word map: expected a JSON object that numbers words from {PAD}'s 0 on, "
            f"each number once, with {UNK}, {START} and {END}; create_input_files.py makes it"
        )
    return word_map


def special_tokens(word_map):
    """Ids of the tokens that no caption may hold."""
    return [word_map[PAD], word_map[START], word_map[UNK]]


def word_map_digest(word_map):
    """Short SHA-256, in hex, of a word map's content, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()[:16]


def load_embeddings(path, word_map, embed_dim):
    """Word vectors in GloVe's or word2vec's text format for the words of a word map.

    :param path: lines of a word and ``embed_dim`` numbers, separated by spaces
    :return: (vectors, found): float32 (vocab_size, embed_dim), zero where the file lacks the word;
        bool (vocab_size,)
    :raises UserError: if the file is missing or a line is malformed (it is named)
    """
    vectors, found = np.zeros((len(word_map), embed_dim), np.float32), np.zeros(len(word_map), bool)
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                # a few of GloVe's words have spaces in them
                word, *values = line.rstrip().rsplit(" ", embed_dim)
                if number == 1 and len(values) == 1:
                    continue  # word2vec's files begin with two counts
                if len(values) != embed_dim:
                    raise ValueError(f"{len(values)} values, expected --embed_dim {embed_dim}")
                if word in word_map:
                    vectors[word_map[word]] = np.array(values, np.float32)  # (embed_dim,)
                    found[word_map[word]] = True
                    if not np.isfinite(vectors[word_map[word]]).all():
                        raise ValueError("a number is not finite")
    except (OSError, ValueError) as error:
        raise UserError(f"the embeddings {path}, line {number}: {_why(error)}") from error
    return vectors, found


# ----------------------------------------------------------------------------------- reading files

MAX_BYTES = 2**28  # of a file of a picture or a text
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".gif", ".bmp", ".webp", ".avif"}
PICTURE_SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm"}


def _read_bytes(path):
    """The content of a file, or of a member of a zip archive."""
    packed = isinstance(path, zipfile.Path)
    path = path if packed else Path(path)
    size = path.root.getinfo(path.at).file_size if packed else path.stat().st_size
    if size > MAX_BYTES or not path.is_file():  # a named pipe would be waited for, for ever
        raise UserError(f"it is no regular file of at most {MAX_BYTES:,} bytes")
    return path.read_bytes()


def _why(error):
    """What an exception of reading a file means to the user."""
    if isinstance(error, UnidentifiedImageError):  # its own text holds an address in memory
        return "not in a known format"
    text = clean_caption(getattr(error, "strerror", None) or str(error))
    return text[:160] or type(error).__name__


def _read_text(path):
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    except Exception as error:  # zipfile raises several types on damaged archives
        raise UserError(f"cannot read {path}: {_why(error)}") from error


def _open_zip(path):
    """A zip archive as the ``zipfile.Path`` of its root."""
    try:
        return zipfile.Path(path)
    except Exception as error:  # zipfile raises several types on damaged archives
        what, advice = "not a whole zip archive", "delete it and download it again"
        with contextlib.suppress(OSError):
            if tarfile.is_tarfile(path):
                what, advice = "a tar archive", f"unpack it (tar -xf {path}) and give the folder"
        raise UserError(f"{path} is {what} ({_why(error)}); {advice}") from error


def _to_rgb(image):
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, whole or float: find out the scale
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0).clip(0)
        scales = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535, values.max())
        values = np.rint(values * (255 / next(top for top in scales if values.max() <= top)))
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


class _Pictures:
    """The files of folders and zip archives, found by the longest common end of their paths.

    Only what was seen while listing is ever opened, so no name from a caption file leads outside.
    """

    def __init__(self, places):
        self.places, self.count = ", ".join(map(str, _as_list(places))), 0  # for messages
        self._files = collections.defaultdict(list)  # by normalised name without suffix
        for place in _as_list(places):
            if place.is_file():
                archive, root = _open_zip(place).root, place.with_suffix("")
                files = {name: zipfile.Path(archive, name) for name in archive.namelist()}
            elif place.is_dir():
                names = glob.iglob("**", root_dir=place, recursive=True, include_hidden=True)
                files, root = {name: place / name for name in names}, place
            else:
                raise UserError(f"there is no folder and no zip archive {place.absolute()}")
            for name, path in files.items():
                parts = _parts(name)
                if not parts or path.is_dir() or "__MACOSX" in parts or parts[-1].startswith("._"):
                    continue  # macOS adds the last two
                whole = _parts(os.path.abspath(root)) + parts
                self._files[_normal(parts)[-1]].append((whole, len(parts), path))
                self.count += _suffix(parts[-1]) != ""

    def find(self, name):
        """The path of a picture by its name or the end of its path; None if it is not there.

        Case and Unicode's composition (NFC, NFD) do not matter, and a suffix may be missing.

        :raises UserError: if several match equally well
        """
        common_end = lambda a, b: len(os.path.commonprefix([a[::-1], b[::-1]]))
        wanted, found = _parts(name) or ("",), []
        for parts, depth, path in self._files.get(_normal(wanted)[-1], ()):
            common = common_end(_normal(parts), _normal(wanted))
            # where the two paths differ, it must be above the folder that was given
            is_same = common == len(wanted) or common >= max(depth, 2)
            if is_same and len({_suffix(parts[-1]), _suffix(wanted[-1]), ""}) < 3:  # jpg, png
                found.append(((common, common == depth, common_end(parts, wanted)), path))
        found.sort(key=lambda item: item[0], reverse=True)
        if len(found) > 1 and found[0][0] == found[1][0]:
            several = f"{found[0][1]} or {found[1][1]}"
            raise UserError(f"{name!r} may be {several}: give more of its path")
        return found[0][1] if found else None


_as_list = lambda paths: [*map(Path, paths if isinstance(paths, (list, tuple)) else [paths])]
_parts = lambda name: tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))
_suffix = lambda name: s if (s := os.path.splitext(name)[1].lower()) in PICTURE_SUFFIXES else ""


def _normal(parts):
    """Parts of a path as they are compared: in one case and composition, without suffix."""
    stem = parts[-1][: len(parts[-1]) - len(_suffix(parts[-1]))]
    return [unicodedata.normalize("NFC", part).casefold() for part in (*parts[:-1], stem)]


# ----------------------------------------------------------------------------- formats of captions

SPLIT_NAMES = {"train": "train", "restval": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "validation", "valid", "dev"), "val")
IMAGE_KEYS = ("image", "file_name", "image_name", "filename")
CAPTION_KEYS = ("caption", "captions", "text", "comment")


def read_rows(path, notes):
    """Yield the rows of a file of captions; its content tells its format, see ``READERS``.

    A row is a :class:`Record` without its picture, after the file and line where it stands.

    :param path: the file; or a Hugging Face image folder, with ``metadata.csv`` or
        ``metadata.jsonl`` beside the pictures, and with folders for the splits, if any
    :param notes: list to which notes for the user are added
    :raises UserError: if the file is malformed (the line is named)
    """
    if not path.is_dir():
        text = _read_text(path)
        read = next(read for form, read in READERS if regex.match(form, text.lstrip()[:1000]))
        yield from read(text, path, notes)
        return
    files = sorted(p for p in path.rglob("metadata.*") if p.suffix in (".csv", ".jsonl"))
    if not files:
        raise UserError(f"{path.absolute()} holds no metadata.csv or .jsonl; give --captions FILE")
    for file in files:
        for where, row in read_rows(file, notes):
            name = file.relative_to(path).parent / row.name
            splits = [row.split, *(SPLIT_NAMES.get(part.lower()) for part in name.parts[:-1])]
            split = next(filter(None, splits), None)
            yield where, row._replace(name=name.as_posix(), split=split)


def _row(fields, where):
    """A row of the fields that CSV and JSON name."""
    fields = fields if isinstance(fields, dict) else {}
    name = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
    captions = next((fields[key] for key in CAPTION_KEYS if key in fields), None)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(name, str) or not name.strip() or not _is_list_of(captions, str):
        forms = 'below the header image,caption[,split], or {"image": "a.jpg", "caption": "a dog"}'
        what = f"expected a picture's name and its caption, {forms}; found {str(fields)[:80]}"
        raise UserError(f"{where}: {what}")
    split, number = str(fields.get("split") or "").strip().lower(), str(fields.get("image_id", ""))
    if split and split not in SPLIT_NAMES:
        raise UserError(f"{where}: unknown split {split!r}; expected one of train, val, test")
    image_id = int(number) if number.isdecimal() and len(number) < 19 else None
    return where, Record(name.strip(), SPLIT_NAMES.get(split), captions, image_id=image_id)


def _json_rows(text, path, notes):
    """COCO's captions, Karpathy's files, a JSON array, or JSON lines."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None  # JSON lines, or damaged
    entries, convert, kind = text.split("\n"), json.loads, "line"
    if isinstance(content, list):
        entries, convert, kind = content, lambda entry: entry, "entry"
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        convert = _coco_fields(content, path) if "annotations" in content else _karpathy_fields
        entries, kind = content["images"], "image"
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, str) and not entry.strip():
            continue
        try:
            fields = convert(entry)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = "not valid JSON" if kind == "line" else "malformed, a key is missing or wrong"
            raise UserError(f"{path}, {kind} {number}: {what} ({_why(error)})") from error
        yield _row(fields, f"{path}, {kind} {number}")


def _karpathy_fields(image):
    """Of ``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``."""
    folder, name = image.get("filepath"), image["filename"]
    return {
        "image": f"{folder}/{name}" if folder else name,
        "captions": [s["raw"] if "raw" in s else " ".join(s["tokens"]) for s in image["sentences"]],
        "split": image["split"],
        "image_id": image.get("cocoid", image.get("imgid")),
    }


def _coco_fields(content, path):
    """Of ``captions_train2014.json`` and the like: function of an image."""
    captions = collections.defaultdict(list)
    try:
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: annotations without image_id and caption") from error
    return lambda image: {
        "image": image["file_name"],
        "captions": captions[image["id"]],
        "split": "train" if "train" in path.name else None,
        "image_id": image["id"],
    }


def _token_rows(text, path, notes):
    """Flickr8k's and Flickr30k's own format: ``name.jpg#0<TAB>caption``."""
    for number, line in enumerate(text.split("\n"), 1):
        found, where = _TOKEN.fullmatch(line.rstrip("\r")), f"{path}, line {number}"
        if found:
            yield where, Record(found[1], None, [found[2]])
        elif line.strip():
            raise UserError(f"{where}: expected name.jpg#0<TAB>caption, found {line[:80]!r}")


def _csv_rows(text, path, notes):
    """CSV with a header, as Kaggle's Flickr8k; with bars for commas, as Kaggle's Flickr30k."""
    bars = "|" in text.lstrip().split("\n")[0]
    form = {"delimiter": "|", "quoting": csv.QUOTE_NONE} if bars else {"strict": True}
    reader, unlike = csv.reader(io.StringIO(text, newline=""), **form), 0
    lines = filter(any, reader)
    try:
        header = [field.strip().lower() for field in next(lines, [])]
        # are the columns there?
        _row(dict.fromkeys(header, "train"), f"{path}, line {reader.line_num}")
        for fields in lines:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                unlike += 1
                has_picture = header[0] in IMAGE_KEYS and _suffix(fields[0].strip())
                if bars and has_picture and unlike == 1:
                    notes.append(f"{where}: a field is missing; left out: {'|'.join(fields)}")
                    continue
                if not has_picture or len(header) > 2 or len(fields) < 2:
                    what = f"{where}: {len(fields)} fields, expected {len(header)}"
                    raise UserError(f"{what}; put captions that hold a comma in double quotes")
                fields = [fields[0], ",".join(fields[1:])]
            yield _row(dict(zip(header, fields)), where)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    if unlike and not bars:
        what = f"{unlike:,} captions of {path} hold commas without quotes"
        notes.append(f"{what}: all that follows the picture's name was read as the caption")


_TOKEN = regex.compile(r"\s*(\S[^\t\n]*?)\s*#\s*\d+\s*\t(.*)")
READERS = ((r"[\[{]", _json_rows), (_TOKEN.pattern, _token_rows), ("", _csv_rows))  # by beginnings

# ----------------------------------------------------------------------------------------- sources


def custom_records(images, captions, seed):
    """The user's own pictures and captions, or a published data set in one of the known formats.

    :param images: folder or zip archive of the pictures, or a list of them
    :param captions: file of captions, or a list of them, see ``READERS`` and :func:`read_rows`
    :param seed: pictures without a split are dealt out with it, see ``_deal_splits``
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if a row is malformed (its line is named) or the pictures are not there
    """
    notes, captions = [], _as_list(captions)
    rows = itertools.chain.from_iterable(read_rows(path, notes) for path in captions)
    pictures, where = _Pictures(images), ", ".join(map(str, captions))
    records, notes = _records(rows, pictures, where, seed, notes)
    if pictures.count > len(records):
        unused = f"{pictures.count - len(records):,} pictures of {pictures.places}"
        notes.append(f"{unused} have no caption in {where}; they are left out")
    return records, notes


def flickr8k_records(folder, seed=0):
    """Flickr8k, with its official split if the lists of it are there.

    :param folder: holds ``Flickr8k_Dataset.zip`` and ``Flickr8k_text.zip`` (read in place), what
        they unpack to, or Kaggle's ``Images`` and ``captions.txt``; or a list of such folders
    :param seed: without lists the pictures are dealt out with it, see ``_deal_splits``
    :return: list of :class:`Record`, list of notes for the user
    :raises UserError: if something is missing or damaged
    """
    notes, captions = [], collections.defaultdict(list)
    where = ", ".join(str(place.absolute()) for place in _as_list(folder))
    images, source, lists = flickr8k_files(folder)
    if not images or not source:
        raise UserError(
            f"{where} is not the whole of Flickr8k: expected Flickr8k_Dataset.zip and "
            "Flickr8k_text.zip, packed or unpacked, or Kaggle's Images and captions.txt"
        )
    for _, row in read_rows(source, notes):
        captions[row.name] += row.captions
    names = [(name.strip(), s) for s in lists for name in _read_text(lists[s]).split("\n")]
    names = names or [(name, None) for name in captions]
    rows = [(where, Record(name, split, captions[name])) for name, split in names if name]
    notes += _check_missing([row.name for _, row in rows if not row.captions], len(rows), source)
    if not lists:
        notes.append("for the official split put Flickr8k_text.zip beside captions.txt")
    return _records(rows, _Pictures(images), where, seed, notes)


def flickr8k_files(folder):
    """What there is of Flickr8k in a folder or a list of folders; texts may lie one folder above.

    :return: path of the pictures, path of the captions (None for what is missing), and dict of
        the official split's names to the paths of its lists (empty unless all are there)
    """
    places = _as_list(folder)
    texts = [*places, *(place.absolute().parent for place in places)]
    archive = _first(texts, ["Flickr8k_text.zip"])
    texts += [_open_zip(archive)] if archive else []
    text = lambda name: _first(texts, [name, f"Flickr8k_text/{name}"])
    folders = ["Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"]
    images = _first(places, [*folders, "Flickr8k_Dataset.zip"])
    captions = text("Flickr8k.token.txt") or _first(places, ["captions.txt"])
    lists = [text(f"Flickr_8k.{part}Images.txt") for part in ("train", "dev", "test")]
    return images, captions, dict(zip(SPLITS, lists)) if all(lists) else {}


def _first(places, names):
    """The first path that exists in one of the folders, or is one of the places itself; or None."""
    paths = (place if place.name == name else place / name for place in places for name in names)
    return next((path for path in paths if path.exists()), None)


def _records(rows, pictures, where, seed, notes):
    """Gather rows by picture, find the pictures, and deal out those without a split.

    :param rows: iterable of (file and line, or another place; :class:`Record`)
    :return: list of :class:`Record`, list of all notes
    """
    gathered, repeated = {}, 0
    for line, row in rows:
        known = gathered.setdefault(row.name, row)
        if row.split and known.split and row.split != known.split:
            message = f"{row.name} is in {row.split} here, but in {known.split} above"
            raise UserError(f"{line}: {message}")
        if known is not row:
            new = [text for text in row.captions if text not in known.captions]
            repeated += len(row.captions) - len(new)
            captions, split = known.captions + new, known.split or row.split
            gathered[row.name] = known._replace(captions=captions, split=split)
    described = {name: row for name, row in gathered.items() if row.captions}
    if not described:
        raise UserError(f"{where} holds no caption; expected a row for each")
    splits, dealt = _deal_splits({name: row.split for name, row in gathered.items()}, seed)
    records, missing, used = [], [], {}
    for name, row in described.items():
        path = pictures.find(name)
        if path is None:
            missing.append(name)
        elif used.setdefault(path, name) != name:
            raise UserError(f"{where} calls {path} both {used[path]!r} and {name!r}; use one name")
        else:
            image = functools.partial(open_image, path)
            records.append(row._replace(split=splits[name], image=image))
    notes = [*notes, *dealt, *_check_missing(missing, len(described), pictures.places)]
    if mute := len(gathered) - len(described):
        notes.append(f"{mute:,} pictures have no caption in {where}; they are left out")
    if repeated:
        notes.append(f"{repeated:,} rows of {where} repeat a caption of the same picture; left out")
    return records, notes


def _check_missing(missing, total, where):
    """Note a few missing pictures; refuse many."""
    if missing and (total == len(missing) or too_many_lost(len(missing), total)):
        raise UserError(
            f"{len(missing):,} of {total:,} pictures are missing in {where} (or have no captions), "
            f"such as {', '.join(map(repr, missing[:3]))}; is it the right folder, and whole?"
        )
    return [f"{name!r} is missing in {where} (or has no caption); left out" for name in missing]


# one picture may always be lost; a data set that lacks more than 3 % is damaged or another one
too_many_lost = lambda lost, total: lost > max(1, 0.03 * total)


def _deal_splits(splits, seed):
    """Deal out the pictures whose source names no split, by the order of their names' hashes.

    Without any split: 80 % train, 10 % val, 10 % test. If there is a training split, but no val or
    test, these get the pictures without a split, or else 10 % of the training pictures each.

    :param splits: dict of names to splits or None
    :return: the same without None, list of notes
    """
    lacking = [split for split in ("test", "val") if split not in splits.values()]
    train, pool = ([n for n, split in splits.items() if split == s] for s in ("train", None))
    size = max(1, round(len(pool or train) / 10))  # of each part but the last, in pictures
    if pool and lacking and train:
        size = math.ceil(len(pool) / len(lacking))
    pool, parts = pool or (train if lacking else []), lacking or ["test", "val"]
    pool.sort(key=lambda n: hashlib.sha256(f"{seed}/{n}".encode("utf-8", "replace")).digest())
    dealt = {name: [*parts, "train"][min(i // size, len(parts))] for i, name in enumerate(pool)}
    counts = collections.Counter(dealt.values())
    said = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
    note = f"no split is named for {len(pool):,} pictures: dealt out by --seed {seed} as {said}"
    return {**splits, **dealt}, [note] * bool(pool)


# ------------------------------------------------------------------------------------------- shapes

SHAPES = ("circle", "square", "triangle", "star")
SHAPE_COLORS = {"red": (214, 34, 38), "green": (28, 152, 58), "blue": (32, 74, 214)}
SHAPE_COLORS |= {"yellow": (250, 212, 22), "white": (250, 250, 250), "black": (18, 18, 20)}
BACKGROUNDS = ("plain", "shaded", "striped", "speckled")
_TINTS = ("98a0aa", "b0a090", "94a698", "aa98a8", "92a0b8", "a6a6a0")
PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_INVERSE = {"left": "right", "above": "below"}
_PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
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


# ------------------------------------------------------------------------------------ HDF5 and disk
# Every structure in the files carries HDF5's own checksum: version 1.10 of the format, and no type
# of variable length, since libhdf5 crashes or hangs on damaged ones. So texts are stored as JSON.

FORMAT = ("show-attend-and-tell captions", 1)  # with its version


def _choose_captions(records, settings):
    """List of (record, texts with words, token lists to encode), counts of what was left out."""
    kept, summary = [], {"empty": 0, "too_long": 0, "without_captions": 0}
    for record in records:
        references = [text for text in map(clean_caption, record.captions) if _WORD.search(text)]
        usable = [words for words in map(tokenize, references) if len(words) <= settings.max_len]
        summary["empty"] += len(record.captions) - len(references)
        summary["too_long"] += len(references) - len(usable)
        if not (usable if record.split == "train" else references):
            summary["without_captions"] += 1
            continue
        if len(usable) > settings.captions_per_image:
            rng = random.Random(f"{settings.seed}/{_valid_text(record.name)}")
            chosen = rng.sample(range(len(usable)), settings.captions_per_image)
            usable = [usable[i] for i in sorted(chosen)]
        kept.append((record, references, usable))
    return kept, summary


@contextlib.contextmanager
def _new_file(path, kept, settings):
    """Create an HDF5 file with room on the disk for a whole split, and give back what it leaves."""
    texts = _pack([(texts, _valid_text(record.name), record.scene) for record, texts, _ in kept])
    rows = sum(len(usable) for _, _, usable in kept) * (4 * (settings.max_len + 2) + 8)
    size = len(kept) * (3 * settings.image_size**2 + 120) + rows + len(texts) + 2**20  # at most
    reserve(path, size)
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        reserve(path, size)  # again, since the file was emptied
        yield file
    h5py.File(path, "r+", locking=False).close()  # cuts off the rest


def reserve(path, size):
    """Claim disk space for a file: libhdf5 and mapped files crash where they find none."""
    if hasattr(os, "posix_fallocate"):
        # not opened for appending, which glibc's emulation refuses
        with open(path, "rb+" if os.path.exists(path) else "wb+") as file:
            utils.precaution("reserving of space", os.posix_fallocate, file.fileno(), 0, size)


def _write_images(file, kept, size, workers):
    """Write pictures; numbers of the readable ones, messages on the others, SHA-256 of all."""
    shape = (len(kept), 3, size, size)
    chunked = {"chunks": (1, *shape[1:]), "maxshape": (None, *shape[1:])}  # a chunk is a picture
    images = file.create_dataset("images", shape, np.uint8, **chunked)

    def load(item):  # a picture as it is stored, or why it cannot be read
        try:
            return resize_image(item[0].image(size), size)
        except UserError as error:
            return error

    readable, unreadable, digest = [], [], hashlib.sha256()
    squares = read_ahead(load, kept, workers or len(utils.own_cores()))
    bar = utils.progress(squares, total=len(kept), desc="writing pictures", unit="picture")
    for i, image in enumerate(bar):
        if isinstance(image, UserError):
            unreadable.append(str(image))
            if too_many_lost(len(unreadable), len(kept)):
                what = f"{len(unreadable)} of the first {i + 1:,} pictures cannot be read"
                raise UserError(f"{what}, too many to go on; the last: {image}") from image
        else:
            images.id.write_direct_chunk((len(readable), 0, 0, 0), image)
            digest.update(image)
            readable.append(i)
    if not readable:
        raise UserError("a split has no picture with a caption; check the captions and --max_len")
    images.resize(len(readable), axis=0)
    return readable, unreadable, digest.hexdigest()


_valid_text = lambda name: name.encode("utf-8", "replace").decode()  # Linux allows any bytes
_pack = lambda value: np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)
_unpack = lambda data: json.loads(data[:].tobytes())
_is_list_of = lambda x, kind: isinstance(x, list) and all(isinstance(item, kind) for item in x)


@contextlib.contextmanager
def _opened(path):
    """Open an HDF5 file for reading; h5py raises nearly every type of exception on damaged ones."""
    if not path.is_file():
        advice = "name its folder with --data_folder, or make it with create_input_files.py"
        raise UserError(f"there is no {path.absolute()}; {advice}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except Exception as error:
        advice = "make it with create_input_files.py --force"
        raise UserError(f"{path} cannot be used ({_why(error)}); {advice}") from error


def _attributes(file):
    """What an HDF5 file says of itself, as dict; checked before the rest is read."""
    decode = lambda value: value.decode() if isinstance(value, bytes) else value.item()
    attributes = {key: decode(value) for key, value in file.attrs.items()}
    if (attributes.get("format"), attributes.get("format_version")) != FORMAT:
        raise ValueError("it is of another format or version")
    if any(item.nbytes > os.path.getsize(file.filename) for item in file.values()):
        raise ValueError("it claims more than it holds")  # for nothing in it is compressed
    return attributes


def _check_layout(dataset, images):
    """:raises ValueError: if the parts of a file do not fit each other"""
    captions, lengths, offsets = dataset.captions, dataset.caption_lengths, dataset.caption_offsets
    is_sound = (
        images.shape == (len(dataset), 3, dataset.image_size, dataset.image_size)
        and (images.dtype, captions.dtype) == (np.uint8, np.int32)
        and _is_list_of(dataset.image_names, str)
        and offsets.shape == (len(dataset) + 1,)
        and (np.diff(offsets) >= 0).all()
        and (offsets[0], offsets[-1]) == (0, len(lengths))
        and captions.shape == (len(lengths), int(dataset.attributes["max_len"]) + 2)
        and captions.min(initial=0) >= 0
        and lengths.min(initial=3) >= 3
        and lengths.max(initial=3) <= captions.shape[1]
    )
    if not is_sound:
        raise ValueError("its parts do not fit each other")


def _stored_list(dataset, key, is_valid):
    """A list with an entry for each picture, stored as JSON; None if the file has none."""
    with _opened(dataset.path) as file:
        values = _unpack(file[key]) if key in file else None
        if values is not None and (len(values) != len(dataset) or not all(map(is_valid, values))):
            raise ValueError(f"its {key} do not fit its pictures")
    return values


def _is_scene(scene):
    """Whether a value has the layout of a scene (see :func:`shapes_records`)."""
    things = scene["objects"]
    are_known = all(t["color"] in SHAPE_COLORS and t["shape"] in SHAPES for t in things)
    return are_known and all(len(t["box"]) == 4 and sum(t["box"]) >= 0 for t in things)


# --------------------------------------------------------------------------------------- features


def read_ahead(function, items, workers, ahead=0):
    """``map(function, items)`` in order; threads prepare ``ahead`` results, or two a worker."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        pending = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > max(ahead, 2 * workers, 2):
                    yield pending.popleft().result()
            yield from (future.result() for future in pending)
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may have stopped early


def feature_key(encoder_digest, images_digest, dtype):
    """Key of a feature store: another one for other weights, pictures or arithmetic."""
    return hashlib.sha256(f"{encoder_digest} {images_digest} {dtype}".encode()).hexdigest()[:12]


def encode_split(dataset, encode, path=None, rows=None, batch_size=32, workers=2):
    """Features of the pictures of a split, read from the feature store ``path`` or computed for it.

    With several processes each computes its share. A run that is stopped leaves what it has, and
    the next one goes on from there. Where no file can be written, they are kept in memory.

    :param dataset: ``CaptionDataset``
    :param encode: function of uint8 (B, 3, S, S) torch tensors to float (B, n, encoder_dim) tensors
    :param path: feature store, a .npy file whose name holds the key; None computes into memory
    :param rows: without a store: slice of the pictures to encode; None: all
    :return: float16 array (N, n, encoder_dim), memory-mapped if stored
    :raises UserError: if the store is damaged or the disk is full
    """
    if path is not None and not utils.broadcast(path.exists() or os.access(path.parent, os.W_OK)):
        where = path.parent.absolute()
        utils.note(f"{where} may not be written: {dataset.split}'s features are kept in memory")
        path = rows = None
    if path is None:
        numbers = np.arange(len(dataset))[rows or slice(None)]
        parts = [part for _, part in _encoded(dataset, encode, numbers, batch_size, workers)]
        none = np.empty((0, 1, 1), np.float16)  # when there are fewer pictures than processes
        return np.concatenate(parts or [none])  # (N, n, encoder_dim)
    if not utils.broadcast(path.exists()):
        # of two runs on one data set the second waits for the first's features
        with utils.locked(lock_path(path), path, wait=True):
            if not utils.broadcast(path.exists()):
                _write_features(path, dataset, encode, batch_size, workers)
    try:
        features = np.load(path, mmap_mode="c")  # copy on write: torch wants to be able to write
        size = features.offset + features.nbytes if features.flags.c_contiguous else 0
        is_whole = size == os.path.getsize(path) and features.dtype == np.float16
        if not is_whole or features.ndim != 3 or len(features) != len(dataset):
            raise ValueError(f"it has not the features of {len(dataset):,} pictures in float16")
    except Exception as error:  # numpy's header is Python text, and raises nearly every type
        what = f"the feature store {path} is damaged ({_why(error)})"
        raise UserError(f"{what}; delete it and run again") from error
    return features  # (N, n, encoder_dim)


def _encoded(dataset, encode, numbers, batch_size, workers):
    """Yield (picture numbers (B,), float16 features (B, n, encoder_dim)) batch by batch."""
    import torch

    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    bar = utils.progress(total=len(numbers), desc=f"encoding {dataset.split}", unit="picture")
    with bar:
        for batch, images in zip(batches, read_ahead(dataset.images, batches, workers)):
            yield batch, encode(torch.from_numpy(images)).to(torch.float16).cpu().numpy()
            bar.update(len(batch))


def _write_features(path, dataset, encode, batch_size, workers):
    """Write a feature store; each process of the run fills in its share.

    It grows as ``.NAME.growing``, at whose end a byte for each picture says whether its features
    are there, so that a run that was stopped can be continued.
    """
    import torch

    growing = path.with_name(f".{path.name}.growing")
    if utils.is_main() and not growing.exists():
        one = encode(torch.from_numpy(dataset.images([0])))  # (1, n, encoder_dim)
        shape = (len(dataset), *one.shape[1:])
        utils.check_disk(path.parent, 2 * math.prod(shape))
        with utils.atomic_path(growing) as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            reserve(temporary, temporary.stat().st_size + len(dataset))
    utils.barrier()
    features = np.load(growing, mmap_mode="r+")
    done = np.memmap(growing, bool, "r+", features.offset + features.nbytes, len(dataset))
    numbers = np.arange(len(dataset))[utils.share(len(dataset))]
    numbers = numbers[~done[numbers]]
    parts = _encoded(dataset, encode, numbers, batch_size, workers)
    fresh = []

    def count_as_done():  # once they are on the disk
        features.flush()
        done[fresh] = True
        fresh.clear()

    def store(part):
        features[part[0]] = part[1]  # (B, n, encoder_dim)
        fresh.extend(part[0])
        if len(fresh) >= 1000:
            count_as_done()

    try:  # in a thread, so that the CNN need not wait for the disk
        collections.deque(read_ahead(store, parts, 1), maxlen=0)
    finally:
        count_as_done()
        if not done[numbers].all():
            utils.note("the features made so far are kept: the next run goes on from there")
    utils.barrier()  # all have written
    if utils.is_main():
        os.truncate(growing, features.offset + features.nbytes)
        os.replace(growing, path)
    utils.barrier()  # and the file has its name


def image_index(dataset):
    """The picture of each caption, int64 (num_captions,)."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.caption_offsets))


def mirrorable(dataset, word_map):
    """Which pictures may be mirrored: no caption says left or right; bool (num_images,)."""
    sides = [word_map[word] for word in ("left", "right") if word in word_map]
    fixed = image_index(dataset)[np.isin(dataset.captions, sides).any(axis=1)]
    return ~np.isin(np.arange(len(dataset)), fixed)


def count_words(dataset, indices):
    """Words to predict in all captions of the given pictures, ``<end>`` included."""
    return sum(collate(dataset, np.asarray(indices)).decode_lengths)
