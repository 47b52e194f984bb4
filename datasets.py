"""Captioned pictures: words become numbers, pictures become squares, and HDF5 files hold both.

A source is read into a list of :class:`Record`; :func:`write_dataset` writes them as three HDF5
files and a word map; :class:`CaptionDataset` reads one of these, :func:`collate` makes batches::

    records, notes = flickr8k_records("data")
    write_dataset("data", records, dataset="flickr8k", source="Flickr8k, official split")
    train = CaptionDataset(split_path("data", "train", base_name("flickr8k", 5, 5)))

What scripts and students take from here and is not defined here stands in the room of
``captioning/data`` that it is imported from.
"""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from captioning.data import hdf5
from captioning.data.features import encode_split
from captioning.data.pictures import open_image, resize_image
from captioning.data.records import SPLITS, Lost, Record, Settings, is_list_of
from captioning.data.shapes import is_scene, shapes_records
from captioning.data.sources import custom_records, flickr8k_files, flickr8k_records
from captioning.data.words import (
    END,
    PAD,
    PAD_ID,
    START,
    UNK,
    build_word_map,
    decode_caption,
    encode_caption,
    load_embeddings,
    load_word_map,
    special_tokens,
    tokenize,
    word_map_digest,
)
from captioning.run.files import atomic_path, locked
from captioning.run.messages import UserError
from captioning.run.paths import base_name, lock_path, split_path, word_map_path


def write_dataset(
    folder,
    records,
    *,
    dataset,
    source,
    min_word_freq=5,
    known=None,
    workers=None,
    lost=None,
    **settings,
):
    """Write the three splits and the word map; they appear together, once all are whole.

    :param records: list of :class:`Record` of all splits
    :param dataset, source: name of the data set, and where it came from, in words
    :param min_word_freq: words rarer than this in the training split become ``<unk>``
    :param known: word map of a model, whose words keep their numbers; new ones follow
    :param workers: threads that decode pictures; default: one for each core
    :param lost: :class:`Lost`, which decides whether too many pictures cannot be read
    :param settings: see :class:`Settings`
    :return: dict of each split's summary (see :func:`write_split`), the word map
    :raises UserError: if a split has no pictures, no word is frequent enough, too many pictures
        cannot be read, or a file cannot be written
    """
    settings, lost = Settings(**settings), lost or Lost()
    name = base_name(dataset, settings.captions_per_image, min_word_freq)
    parts = {split: [record for record in records if record.split == split] for split in SPLITS}
    if lacking := [split for split in SPLITS if not parts[split]]:
        raise UserError(f"{dataset} has no pictures in its {lacking[0]} split; each needs some")
    texts = (text for record in parts["train"] for text in record.captions)
    word_map = build_word_map(map(tokenize, texts), min_word_freq, known)
    if len(word_map) == len((PAD, UNK, START, END)):
        what = f"no word of the training captions occurs {min_word_freq} times"
        raise UserError(f"{what}; check that they hold words, or lower --min_word_freq")
    about = {"dataset": dataset, "name": name, "min_word_freq": min_word_freq, "source": source}
    about |= {"words_of": word_map_digest(known)} if known else {}
    map_path, summaries = word_map_path(folder, name), {}
    with contextlib.ExitStack() as finished:  # at its end the files get their names
        finished.enter_context(locked(lock_path(map_path), Path(folder) / name))
        for split, part in parts.items():
            path = finished.enter_context(atomic_path(split_path(folder, split, name)))
            summaries[split] = write_split(path, part, word_map, settings, about, workers)
            lost.add(summaries[split]["unreadable"], len(part), f"of {split} cannot be read")
        lost.check()
        path = finished.enter_context(atomic_path(map_path))
        path.write_text(json.dumps(word_map, ensure_ascii=False) + "\n", encoding="utf-8")
    return summaries, word_map


def write_split(path, records, word_map, settings, about, workers=None):
    """Write one HDF5 file, in place: give it a path from :func:`captioning.run.files.atomic_path`.

    The same input gives the same bytes. Left out and counted: captions without a word; pictures
    without a caption (for training, without one of at most ``max_len`` words); pictures that cannot
    be read. All captions with a word are kept as references.

    :param records: list of :class:`Record` of one split
    :param about: dict of what else the file should say of itself
    :return: dict of counts: ``pictures``, ``captions`` (encoded), ``references``, ``words``
        (encoded), ``unknown`` (of these, ``<unk>``), ``empty`` and ``too_long`` (captions),
        ``without_captions`` (pictures), ``bytes``; and ``unreadable``, a dict of names to messages
    :raises UserError: if no picture with a caption can be read
    """
    kept, summary = hdf5.choose_captions(records, settings)
    with hdf5.new_file(path, kept, settings) as file:
        readable, unreadable, digest = hdf5.write_images(file, kept, settings.image_size, workers)
        unreadable = {hdf5.valid_text(kept[i][0].name): why for i, why in unreadable.items()}
        kept = [kept[i] for i in readable]
        encoded = [words for _, _, usable in kept for words in usable]
        captions = np.empty((len(encoded), settings.max_len + 2), np.int32)
        for i, words in enumerate(encoded):
            captions[i] = encode_caption(words, word_map, settings.max_len)  # (max_len + 2,)
        file["captions"] = captions  # (num_captions, max_len + 2)
        file["caption_lengths"] = np.array([len(words) + 2 for words in encoded], np.int64)
        file["caption_offsets"] = np.cumsum([0, *(len(u) for _, _, u in kept)], dtype=np.int64)
        file["references"] = hdf5.pack([references for _, references, _ in kept])
        file["image_names"] = hdf5.pack([hdf5.valid_text(record.name) for record, _, _ in kept])
        for key in ("scene", "image_id"):
            values = [getattr(record, key) for record, _, _ in kept]
            if any(value is not None for value in values):
                file[f"{key}s"] = hdf5.pack(values)
        about = {
            "format": hdf5.FORMAT[0],
            "format_version": hdf5.FORMAT[1],
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
        with hdf5.opened(self.path) as file:
            self.attributes = hdf5.attributes(file)
            for key in ("split", "dataset", "name", "images_digest", "word_map_digest"):
                setattr(self, key, str(self.attributes[key]))
            self.image_size = int(self.attributes["image_size"])
            self.captions = file["captions"][:]  # (num_captions, max_len + 2)
            self.caption_lengths = file["caption_lengths"][:]  # (num_captions,)
            self.caption_offsets = file["caption_offsets"][:]  # (num_images + 1,)
            self.image_names = hdf5.unpack(file["image_names"])
            hdf5.check_layout(self, file["images"])

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
        with hdf5.opened(self.path, self.images_digest) as file:
            images = file["images"]  # (num_images, 3, image_size, image_size)
            for row, i in enumerate(indices):
                batch[row] = images[i]  # (3, image_size, image_size)
        return batch

    @functools.cached_property
    def raw_references(self):
        """All captions of each picture, as text: list of lists of str."""
        return hdf5.stored_list(self, "references", lambda texts: is_list_of(texts, str))

    @functools.cached_property
    def references(self):
        """All captions of each picture, as lists of words (real words, never ``<unk>``)."""
        return [[tokenize(text) for text in texts] for texts in self.raw_references]

    @functools.cached_property
    def scenes(self):
        """What each generated picture shows (see :func:`shapes_records`); None for photographs."""
        return hdf5.stored_list(self, "scenes", is_scene)

    @functools.cached_property
    def image_ids(self):
        """The source's own number of each picture, such as COCO's: list of int or None."""
        ids = hdf5.stored_list(self, "image_ids", lambda i: i is None or type(i) is int)
        return ids or [None] * len(self)

    def check_word_map(self, word_map):
        """:raises UserError: if the captions were encoded with another word map"""
        is_its_own = word_map_digest(word_map) == self.word_map_digest
        if not is_its_own or self.captions.max(initial=0) >= len(word_map):
            right = word_map_path(self.path.parent, self.name)
            advice = f"use its own, {right}, or make both with create_input_files.py --force"
            raise UserError(f"{self.path} was encoded with another word map; {advice}")

    def renumber(self, word_map, other):
        """Give the captions the numbers of another word map, ``other``, of the same words."""
        numbers = np.array([other[word] for word in sorted(word_map, key=word_map.get)], np.int32)
        self.captions = numbers[self.captions]  # (num_captions, max_len + 2)


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


def image_index(dataset):
    """The picture of each caption, int64 (num_captions,)."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.caption_offsets))


SIDES = {"left", "right", "左", "右"}  # and in German, French, Spanish, Italian, Portuguese
SIDES |= {"links", "linke", "linken", "linker", "rechts", "rechte", "rechten", "rechter"}
SIDES |= {"gauche", "droite", "izquierda", "izquierdo", "derecha", "derecho"}
SIDES |= {"sinistra", "sinistro", "destra", "destro", "esquerda", "esquerdo", "direita", "direito"}


def mirrorable(dataset):
    """Which pictures may be mirrored: no caption says left or right; bool (num_images,)."""
    return np.array([all(map(SIDES.isdisjoint, texts)) for texts in dataset.references])


def count_words(dataset, indices):
    """Words to predict in all captions of the given pictures, ``<end>`` included."""
    return sum(collate(dataset, np.asarray(indices)).decode_lengths)
