"""What tests of several files build and compare with."""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import make_picture
from PIL import Image

import datasets
import models
from captioning.data import formats
from captioning.model.dry_run import check_decoder
from datasets import CaptionDataset, Record
from utils import UserError

RECURRENT = [  # made by ``models.recurrent``: take any attention
    name
    for name, factory in models.DECODERS.items()
    if getattr(factory, "func", None) is models.DecoderWithAttention
]
PAIRS = [(decoder, look) for decoder in RECURRENT for look in models.ATTENTIONS]
PAIRS += [(decoder, "soft") for decoder in models.DECODERS if decoder not in RECURRENT]

EXAMPLES = [  # candidate, references
    (
        "a dog runs on the grass",
        ["a dog runs on the green grass", "the dog is running", "a brown dog on grass"],
    ),
    ("two men play football", ["two men are playing football on a field", "men play a game"]),
    ("a a a a", ["a cat sits on a mat", "the cat is on the mat"]),
    (
        "a child in a red shirt climbs a rope",
        ["a child in a red shirt climbs up a rope", "a child climbs a rope"],
    ),
]


HYPOTHESES = [candidate.split() for candidate, _ in EXAMPLES]


REFERENCES = [[text.split() for text in texts] for _, texts in EXAMPLES]


def as_coco():
    return (
        {i: [" ".join(text) for text in texts] for i, texts in enumerate(REFERENCES)},
        {i: [" ".join(words)] for i, words in enumerate(HYPOTHESES)},
    )


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def contents(records):
    return [(r.name, r.split, r.captions, np.array(r.image(32)).tobytes()) for r in records]


def record(i, split="train", captions=("a dog runs",), image=None):
    return Record(f"{i}.jpg", split, list(captions), image or (lambda size: make_picture(i)))


def write(folder, records, **options):
    options = {"min_word_freq": 1, "max_len": 6, "image_size": 32, **options}
    summaries, word_map = datasets.write_dataset(
        folder, records, dataset="mine", source="test", **options
    )
    name = datasets.base_name(
        "mine", options.get("captions_per_image", 5), options["min_word_freq"]
    )
    return (
        [CaptionDataset(datasets.split_path(folder, split, name)) for split in datasets.SPLITS],
        summaries,
        word_map,
    )


def broken(size):
    raise UserError("cannot read the picture")


def packed(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def save_pictures(folder, names, start=0):
    for i, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_picture(i)).save(folder / name, "PNG")
    return folder


def shown(record):
    """The number of the picture that a record shows."""
    pixels = np.array(record.image(36))
    return next(i for i in range(99) if np.array_equal(pixels, make_picture(i)))


def write_csv(path, rows):
    path.write_text("".join(f"{','.join(row)}\n" for row in [("image", "caption"), *rows]))
    return path


def rows_of(path, text, encoding="utf-8"):
    """What each row of a file of captions says: name, split, captions; and the notes."""
    path.write_bytes(text.encode(encoding))
    notes = []
    return [(r.name, r.split, r.captions) for _, r in formats.read_rows(path, notes)], notes


PAD, UNK, START, END = 0, 7, 8, 9  # of conftest's word_map


CAPTIONS = torch.tensor(
    [  # longest first: <start>, words, <end>, <pad>
        [START, 1, 2, 3, 4, 6, END],
        [START, 1, 2, 4, 5, END, PAD],
        [START, 3, 2, 2, END, PAD, PAD],
        [START, 5, END, PAD, PAD, PAD, PAD],
    ]
)


LENGTHS = [6, 5, 4, 2]  # words to predict, <end> included


PICTURES = torch.tensor([1, 0, 2, 1])  # two captions describe picture 1


def check_contract(decoder):
    """The dry run of a decoder over two images, as before the first epoch."""
    captioner = argparse.Namespace(decoder=decoder, encode=lambda _: features(5)[[0, 4]])
    check_decoder(captioner, np.zeros((2, 3, 8, 8), np.uint8))


def features(num_pictures=3, side=3, seed=5, encoder_dim=6):
    return torch.randn(
        num_pictures, side * side, encoder_dim, generator=torch.Generator().manual_seed(seed)
    )


def search(decoder, encoder_out, word_map, **options):
    """The plain search: the likeliest captions, whatever their length."""
    options = {"length_penalty": 0, **options}
    return models.beam_search([decoder], [encoder_out], word_map, **options)


def without(dictionary, *keys):
    return {key: value for key, value in dictionary.items() if key not in keys}


def save(path, seed=0, width=48, height=36):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_picture(seed, width, height)).save(path)
    return path


def written():
    """Files in the folder ``out``; asserts that nothing else was made beside the pictures."""
    assert {path.name for path in Path().iterdir()} <= {"out", "pictures", "captions.json"}
    return {path.name for path in Path("out").iterdir()}


def make_flickr8k(folder, pictures=10, line_end="\n"):
    """A miniature of Flickr8k's two archives, with macOS's extra members and an odd caption."""
    names = [f"{i:02d}_ab.jpg" for i in range(pictures)]
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(names):
            archive.writestr(
                f"Flicker8k_Dataset/{name}", encoded(Image.fromarray(make_picture(i)), "JPEG")
            )
            archive.writestr(f"__MACOSX/Flicker8k_Dataset/._{name}", b"resource fork")
    captions = [f"{name}#{k}\tA dog {k} runs on the grass ." for name in names for k in range(5)]
    texts = {
        "Flickr8k.token.txt": [*captions, "00_ab.jpg.1#0\tpeople waiting"],
        "Flickr_8k.trainImages.txt": names[:6],
        "Flickr_8k.devImages.txt": names[6:8],
        "Flickr_8k.testImages.txt": names[8:],
    }
    with zipfile.ZipFile(folder / "Flickr8k_text.zip", "w") as archive:
        for name, lines in texts.items():
            archive.writestr(name, line_end.join([*lines, ""]))
            archive.writestr(f"__MACOSX/._{name}", b"resource fork")
    return folder
