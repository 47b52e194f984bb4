"""What stands in an HDF5 file of captioned pictures, and how it is checked.

Every structure in the files carries HDF5's own checksum: version 1.10 of the format, and no type
of variable length, since libhdf5 crashes or hangs on damaged ones. So texts are stored as JSON.
"""

import contextlib
import hashlib
import json
import os
import random

import h5py
import numpy as np

from captioning.data.pictures import resize_image
from captioning.data.records import is_list_of
from captioning.data.words import WORD, clean_caption, tokenize
from captioning.run.files import reserve
from captioning.run.machine import own_cores, read_ahead
from captioning.run.messages import UserError, progress, why

FORMAT = ("show-attend-and-tell captions", 1)  # with its version


def choose_captions(records, settings):
    """List of (record, texts with words, token lists to encode), counts of what was left out."""
    kept, summary = [], {"empty": 0, "too_long": 0, "without_captions": 0}
    for record in records:
        references = [text for text in map(clean_caption, record.captions) if WORD.search(text)]
        usable = [words for words in map(tokenize, references) if len(words) <= settings.max_len]
        summary["empty"] += len(record.captions) - len(references)
        summary["too_long"] += len(references) - len(usable)
        if not (usable if record.split == "train" else references):
            summary["without_captions"] += 1
            continue
        if len(usable) > settings.captions_per_image:
            rng = random.Random(f"{settings.seed}/{valid_text(record.name)}")
            chosen = rng.sample(range(len(usable)), settings.captions_per_image)
            usable = [usable[i] for i in sorted(chosen)]
        kept.append((record, references, usable))
    return kept, summary


@contextlib.contextmanager
def new_file(path, kept, settings):
    """Create an HDF5 file with room on the disk for a whole split, and give back what it leaves."""
    texts = pack([(texts, valid_text(record.name), record.scene) for record, texts, _ in kept])
    rows = sum(len(usable) for _, _, usable in kept) * (4 * (settings.max_len + 2) + 8)
    size = len(kept) * (3 * settings.image_size**2 + 120) + rows + len(texts) + 2**20  # at most
    reserve(path, size)
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        reserve(path, size)  # again, since the file was emptied
        yield file
    h5py.File(path, "r+", locking=False).close()  # cuts off the rest


def write_images(file, kept, size, workers):
    """Write pictures; numbers of the readable ones, dict of the others' to why, SHA-256 of all."""
    shape = (len(kept), 3, size, size)
    chunked = {"chunks": (1, *shape[1:]), "maxshape": (None, *shape[1:])}  # a chunk is a picture
    images = file.create_dataset("images", shape, np.uint8, **chunked)

    def load(item):  # a picture as it is stored, or why it cannot be read
        try:
            return resize_image(item[0].image(size), size)
        except UserError as error:
            return error

    readable, unreadable, digest = [], {}, hashlib.sha256()
    squares = read_ahead(load, kept, workers or len(own_cores()))
    bar = progress(squares, total=len(kept), desc="writing pictures", unit="picture")
    for i, image in enumerate(bar):
        if isinstance(image, UserError):
            unreadable[i] = str(image)
        else:
            images.id.write_direct_chunk((len(readable), 0, 0, 0), image)
            digest.update(image)
            readable.append(i)
    if unreadable and not readable:
        what = f"none of the {len(kept):,} pictures of a split can be read"
        raise UserError(f"{what}: {unreadable[0]}")
    if not readable:
        raise UserError("a split has no picture with a caption; check the captions and --max_len")
    images.resize(len(readable), axis=0)
    return readable, unreadable, digest.hexdigest()


valid_text = lambda name: name.encode("utf-8", "replace").decode()  # Linux allows any bytes
pack = lambda value: np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)
unpack = lambda data: json.loads(data[:].tobytes())


@contextlib.contextmanager
def opened(path, images_digest=None):
    """Open an HDF5 file for reading; h5py raises nearly every type of exception on damaged ones.

    :param images_digest: of the file that was opened before; another one has taken its place since
    """
    if not path.is_file():
        advice = "name its folder with --data_folder"
        split, _, _ = path.name.partition("_")
        if others := sorted(path.parent.glob(f"{split}_*{path.suffix}")):
            names = " or ".join(other.stem.removeprefix(f"{split}_") for other in others[:3])
            advice = f"its folder has {names} (--data_name)"
        advice += ", or make it with create_input_files.py"
        raise UserError(f"there is no {path.absolute()}; {advice}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if images_digest not in (None, attributes(file)["images_digest"]):
                what = "was made anew, of other pictures, while it was in use"
                raise UserError(f"{path} {what}: start again")
            yield file
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} may not be read: ask its owner for the permission") from error
    except Exception as error:
        advice = "make it with create_input_files.py --force"
        raise UserError(f"{path} cannot be used ({why(error)}); {advice}") from error


def attributes(file):
    """What an HDF5 file says of itself, as dict; checked before the rest is read."""
    decode = lambda value: value.decode() if isinstance(value, bytes) else value.item()
    attributes = {key: decode(value) for key, value in file.attrs.items()}
    if (attributes.get("format"), attributes.get("format_version")) != FORMAT:
        raise ValueError("it is of another format or version")
    if any(item.nbytes > os.path.getsize(file.filename) for item in file.values()):
        raise ValueError("it claims more than it holds")  # for nothing in it is compressed
    return attributes


def check_layout(dataset, images):
    """:raises ValueError: if the parts of a file do not fit each other"""
    captions, lengths, offsets = dataset.captions, dataset.caption_lengths, dataset.caption_offsets
    is_sound = (
        images.shape == (len(dataset), 3, dataset.image_size, dataset.image_size)
        and (images.dtype, captions.dtype) == (np.uint8, np.int32)
        and is_list_of(dataset.image_names, str)
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


def stored_list(dataset, key, is_valid):
    """A list with an entry for each picture, stored as JSON; None if the file has none."""
    with opened(dataset.path, dataset.images_digest) as file:
        values = unpack(file[key]) if key in file else None
        if values is not None and (len(values) != len(dataset) or not all(map(is_valid, values))):
            raise ValueError(f"its {key} do not fit its pictures")
    return values
